// A mixture of experts: see experts.c.
#pragma once

#include "products.h"

typedef struct {
    const Weight *router;                   // [count, hidden_size], not quantised
    const Weight *const *gate_up, *const *down;  // [count]: an expert's gate and up, with a gate, and its down product
    int64_t count, per_row;
    int32_t normalised;  // whether the shares of a row's experts add up to 1
} Experts;

typedef struct {
    const Experts *experts;
    const void *x;         // [rows][hidden_size] of dtype
    const void *residual;  // like x, or NULL
    void *out;             // like x, perhaps the residual's memory
    int64_t rows;
    int32_t dtype;
    const Shards *shards;  // of each expert's inner width; the sum over a row's experts is rounded, too: see Product
    int64_t shard_stride;
    char *scratch;
} Mixture;

// Bytes of scratch memory that a mixture needs in a pool of so many threads.
size_t KERNEL(mixture_scratch)(const Mixture *mixture, int n_threads);

// One thread's part, inside a task of the pool; has barriers inside.
void KERNEL(mixture_part)(const Mixture *mixture, int thread, int n_threads);

// A whole mixture, in the pool. Returns 0, or 1 where memory is short.
int KERNEL(mixture)(const Experts *experts, const void *x, void *out, const void *residual, long rows, int dtype,
                    const Shards *shards, int64_t shard_stride);
