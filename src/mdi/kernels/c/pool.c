// The pool of threads: workers wait at the `start` gate, run the task, and meet the caller at the barrier.
//
//     caller   start.value + 1     task(0)   barrier
//     worker   waits for that      task(i)   barrier   waits again
//
// A waiting thread spins for SPIN_NS, because the next task mostly comes at once, then sleeps on a condition. Where there
// are more threads than cores nobody spins: the spinning thread would hold the core that the awaited one needs.
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 1024, SPIN_NS = 100000, PAUSES_PER_CLOCK = 32 };

typedef struct {
    _Alignas(64) atomic_uint value;
    atomic_int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} Gate;

static Gate start = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
static Gate meeting = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
static _Alignas(64) atomic_int arrived;

static pthread_rwlock_t region = PTHREAD_RWLOCK_INITIALIZER;  // held by the thread whose task runs; of one thread, shared
static int wanted = 1;                                      // threads of the pool, the caller included
static int n_threads = 1;                                   // of these, how many exist
static int spins = 1;
static mdi_task current;  // NULL ends the workers
static void *current_context;
static pthread_t workers[MAX_THREADS];

static inline void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int spin_until_changed(Gate *gate, unsigned old) {
    if (!spins) return atomic_load(&gate->value) != old;
    int64_t end = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < PAUSES_PER_CLOCK; i++) {
            if (atomic_load_explicit(&gate->value, memory_order_acquire) != old) return 1;
            pause_core();
        }
    } while (now_ns() < end);
    return 0;
}

static void wait_until_changed(Gate *gate, unsigned old) {
    if (spin_until_changed(gate, old)) return;
    pthread_mutex_lock(&gate->lock);
    atomic_fetch_add(&gate->sleepers, 1);  // before the value is read: who changes it reads this afterwards
    while (atomic_load(&gate->value) == old) pthread_cond_wait(&gate->changed, &gate->lock);
    atomic_fetch_sub(&gate->sleepers, 1);
    pthread_mutex_unlock(&gate->lock);
}

static void change(Gate *gate) {
    atomic_fetch_add(&gate->value, 1);
    if (!atomic_load(&gate->sleepers)) return;
    pthread_mutex_lock(&gate->lock);
    pthread_cond_broadcast(&gate->changed);
    pthread_mutex_unlock(&gate->lock);
}

void mdi_barrier(void) {
    if (n_threads == 1) return;
    unsigned old = atomic_load(&meeting.value);
    if (atomic_fetch_add(&arrived, 1) + 1 < n_threads) {
        wait_until_changed(&meeting, old);
        return;
    }
    atomic_store(&arrived, 0);
    change(&meeting);
}

typedef struct {
    int thread;
    unsigned seen;
} Birth;

static Birth births[MAX_THREADS];

static void *work(void *argument) {
    Birth *birth = argument;
    unsigned seen = birth->seen;
    for (;;) {
        wait_until_changed(&start, seen);
        seen++;
        if (!current) return NULL;
        current(current_context, birth->thread, n_threads);
        mdi_barrier();
    }
}

static void start_workers(void) {
    sigset_t all, before;
    sigfillset(&all);  // signals are for Python's threads
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (n_threads < wanted) {
        births[n_threads] = (Birth){n_threads, atomic_load(&start.value)};
        if (pthread_create(&workers[n_threads], NULL, work, &births[n_threads])) break;  // fewer, then
        n_threads++;
    }
    wanted = n_threads;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void end_workers(void) {
    current = NULL;
    change(&start);
    for (int i = 1; i < n_threads; i++) pthread_join(workers[i], NULL);
    n_threads = 1;
}

static int usable_cores(void) {
#if defined(__linux__)
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
#endif
    return (int)sysconf(_SC_NPROCESSORS_ONLN);
}

static void forget_workers(void) {  // the child of a fork has none
    Gate fresh = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    pthread_rwlock_t unlocked = PTHREAD_RWLOCK_INITIALIZER;
    start = meeting = fresh;
    region = unlocked;
    atomic_store(&arrived, 0);
    n_threads = 1;
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

void mdi_set_threads(int count) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    if (count < 1) count = 1;
    if (count > MAX_THREADS) count = MAX_THREADS;
    pthread_rwlock_wrlock(&region);
    if (count != n_threads) end_workers();
    wanted = count;
    spins = count <= usable_cores();
    pthread_rwlock_unlock(&region);
}

int mdi_threads(void) { return wanted; }

// A task of one thread needs no other one of the pool. Returns whether it ran.
static int run_alone(mdi_task task, void *context) {
    pthread_rwlock_rdlock(&region);
    int alone = wanted == 1;
    if (alone) task(context, 0, 1);
    pthread_rwlock_unlock(&region);
    return alone;
}

void mdi_parallel(mdi_task task, void *context) {
    if (run_alone(task, context)) return;
    pthread_rwlock_wrlock(&region);
    if (n_threads < wanted) start_workers();
    if (n_threads > 1) {
        current = task;
        current_context = context;
        change(&start);
    }
    task(context, 0, n_threads);
    mdi_barrier();
    pthread_rwlock_unlock(&region);
}
