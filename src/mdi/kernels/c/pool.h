// The pool of threads of this process. Thread 0 is the caller.
#ifndef MDI_POOL_H
#define MDI_POOL_H

typedef void (*mdi_task)(void *context, int thread, int n_threads);

// Runs task once on every thread of the pool and returns when all are done. Calls from several threads take turns,
// except in a pool of one thread.
void mdi_parallel(mdi_task task, void *context);

// Waits, inside a task, until every thread of the pool has come here.
void mdi_barrier(void);

// Sets how many threads compute, the caller included.
void mdi_set_threads(int n_threads);

int mdi_threads(void);

#endif
