#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

// A wait within a step is short: it spins, for about a millisecond at most, and then yields the core, since one that
// it waits for may need it. Between steps the threads sleep soon, since other processes run on the same cores.
enum { SPINS = 40000, SPINS_BEFORE_SLEEP = 4000, YIELDS_BEFORE_SLEEP = 20 };

struct worker {
    struct member member;
    pthread_t thread;
};

struct team {
    int64_t num_threads;
    _Alignas(64) atomic_int num_arrived; // at the barrier
    _Alignas(64) atomic_uint barrier;    // grows with each barrier that all have reached
    _Alignas(64) atomic_uint job;        // grows with each job
    atomic_int num_sleeping;
    void (*work)(const struct member *, void *); // NULL: end
    void *context;
    pthread_mutex_t mutex; // of `wake` only
    pthread_cond_t wake;
    struct worker workers[]; // [num_threads], the first is the caller's and has no thread
};

static void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Returns once the word differs from `old`; at the latest after `max_yields` yields, if that is not negative.
static bool wait_for_change(atomic_uint *word, unsigned old, int num_spins, int max_yields) {
    for (int spin = 0; spin < num_spins; spin++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old)
            return true;
        pause_core();
    }
    for (int yields = 0; max_yields < 0 || yields < max_yields; yields++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old)
            return true;
        sched_yield();
    }
    return false;
}

void team_wait(const struct member *member) {
    struct team *team = member->team;
    unsigned before = atomic_load_explicit(&team->barrier, memory_order_acquire);
    if (atomic_fetch_add(&team->num_arrived, 1) + 1 == team->num_threads) {
        atomic_store(&team->num_arrived, 0);
        atomic_fetch_add(&team->barrier, 1);
    } else {
        wait_for_change(&team->barrier, before, SPINS, -1);
    }
}

static void sleep_until_job(struct team *team, unsigned last) {
    pthread_mutex_lock(&team->mutex);
    atomic_fetch_add(&team->num_sleeping, 1); // before `job` is read, as team_run writes `job` before it reads this
    while (atomic_load(&team->job) == last)
        pthread_cond_wait(&team->wake, &team->mutex);
    atomic_fetch_sub(&team->num_sleeping, 1);
    pthread_mutex_unlock(&team->mutex);
}

static void announce_job(struct team *team, void (*work)(const struct member *, void *), void *context) {
    team->work = work;
    team->context = context;
    atomic_fetch_add(&team->job, 1);
    if (atomic_load(&team->num_sleeping) > 0) {
        pthread_mutex_lock(&team->mutex);
        pthread_cond_broadcast(&team->wake);
        pthread_mutex_unlock(&team->mutex);
    }
}

static void *run_worker(void *argument) {
    struct worker *worker = argument;
    struct team *team = worker->member.team;
    for (unsigned last = 0;; last++) {
        if (!wait_for_change(&team->job, last, SPINS_BEFORE_SLEEP, YIELDS_BEFORE_SLEEP))
            sleep_until_job(team, last);
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
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->wake, NULL);
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
    pthread_cond_destroy(&team->wake);
    pthread_mutex_destroy(&team->mutex);
    free(team);
}
