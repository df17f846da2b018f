// A team of threads that run the same function and wait for each other.
#ifndef DUET_THREADS_H
#define DUET_THREADS_H

#include <stdint.h>

struct team;

struct member {
    struct team *team;
    int64_t index; // below num_threads; 0 is the caller of team_run
    int64_t num_threads;
};

// A part of a range that is cut evenly over a team.
struct part {
    int64_t start;
    int64_t end;
};

struct part part_of(const struct member *member, int64_t size);

// num_threads counts the caller of team_run; the others are made now, thread i bound to cores[i]. NULL where the
// system has no more threads to give.
struct team *team_create(int64_t num_threads, const int32_t *cores);
void team_destroy(struct team *team);

// Runs `work` on every thread and returns when all have ended. One caller at a time.
void team_run(struct team *team, void (*work)(const struct member *member, void *context), void *context);

// Returns when every thread has called it; what each wrote before, all can read.
void team_wait(const struct member *member);

#endif
