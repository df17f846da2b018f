#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

// A wait spins for some twenty microseconds, more than the threads of a step drift apart. One that takes longer means
// that somebody else has the core of a thread that is missing: the waiting one then sleeps, so that its own core is free
// for them. It does not yield: Linux charges a yield like a whole slice of time, and the thread would starve.
enum { SPINS = 1000 };

// Grows; threads wait until it does.
struct event {
    _Alignas(64) atomic_uint count;
    atomic_int num_sleeping;
    pthread_mutex_t mutex; // of `grown`
    pthread_cond_t grown;
};

struct worker {
    struct member member;
    pthread_t thread;
};

struct team {
    int64_t num_threads;
    struct event barrier;                // that all have reached
    struct event job;
    _Alignas(64) atomic_int num_arrived; // at the barrier
    void (*work)(const struct member *, void *); // NULL: end
    void *context;
    struct worker workers[]; // [num_threads], the first is the caller's and has no thread
};

static void event_init(struct event *event) {
    pthread_mutex_init(&event->mutex, NULL);
    pthread_cond_init(&event->grown, NULL);
}

static void event_destroy(struct event *event) {
    pthread_cond_destroy(&event->grown);
    pthread_mutex_destroy(&event->mutex);
}

static void event_grow(struct event *event) {
    atomic_fetch_add(&event->count, 1);
    if (atomic_load(&event->num_sleeping) > 0) {
        pthread_mutex_lock(&event->mutex);
        pthread_cond_broadcast(&event->grown);
        pthread_mutex_unlock(&event->mutex);
    }
}

static void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Returns once the count differs from `before`.
static void event_wait(struct event *event, unsigned before) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&event->count, memory_order_acquire) != before)
            return;
        pause_core();
    }
    pthread_mutex_lock(&event->mutex);
    atomic_fetch_add(&event->num_sleeping, 1); // before `count` is read, as event_grow writes that before it reads this
    while (atomic_load(&event->count) == before)
        pthread_cond_wait(&event->grown, &event->mutex);
    atomic_fetch_sub(&event->num_sleeping, 1);
    pthread_mutex_unlock(&event->mutex);
}

void team_wait(const struct member *member) {
    struct team *team = member->team;
    unsigned before = atomic_load_explicit(&team->barrier.count, memory_order_acquire);
    if (atomic_fetch_add(&team->num_arrived, 1) + 1 < team->num_threads) {
        event_wait(&team->barrier, before);
        return;
    }
    atomic_store(&team->num_arrived, 0);
    event_grow(&team->barrier);
}

static void announce_job(struct team *team, void (*work)(const struct member *, void *), void *context) {
    team->work = work;
    team->context = context;
    event_grow(&team->job);
}

static void *run_worker(void *argument) {
    struct worker *worker = argument;
    struct team *team = worker->member.team;
    for (unsigned last = 0;; last++) {
        event_wait(&team->job, last);
        if (!team->work)
            return NULL;
        team->work(&worker->member, team->context);
        team_wait(&worker->member);
    }
}

struct part part_of(const struct member *member, int64_t size) {
    return (struct part){size * member->index / member->num_threads, size * (member->index + 1) / member->num_threads};
}

void team_run(struct team *team, void (*work)(const struct member *, void *), void *context) {
    announce_job(team, work, context);
    const struct member *caller = &team->workers[0].member;
    work(caller, context);
    team_wait(caller);
}

static void bind_to_core(pthread_t thread, int32_t core) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    pthread_setaffinity_np(thread, sizeof cores, &cores); // where that is forbidden, it runs unbound
}

struct team *team_create(int64_t num_threads, const int32_t *cores) {
    size_t size = sizeof(struct team) + (size_t)num_threads * sizeof(struct worker);
    struct team *team = aligned_alloc(64, (size + 63) / 64 * 64);
    if (!team)
        return NULL;
    *team = (struct team){.num_threads = num_threads};
    event_init(&team->barrier);
    event_init(&team->job);
    for (int64_t i = 0; i < num_threads; i++) {
        struct worker *worker = &team->workers[i];
        worker->member = (struct member){team, i, num_threads};
        if (i == 0)
            continue;
        if (pthread_create(&worker->thread, NULL, run_worker, worker)) {
            team->num_threads = i; // those that exist
            team_destroy(team);
            return NULL;
        }
        bind_to_core(worker->thread, cores[i]);
    }
    return team;
}

void team_destroy(struct team *team) {
    announce_job(team, NULL, NULL);
    for (int64_t i = 1; i < team->num_threads; i++)
        pthread_join(team->workers[i].thread, NULL);
    event_destroy(&team->barrier);
    event_destroy(&team->job);
    free(team);
}
