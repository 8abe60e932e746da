// Rotary positions, and what is written to the KV cache: see rotary.c.
#pragma once

#include <stdint.h>

#include "attention.h"
#include "kernel.h"

typedef struct {
    void *heads;                  // [rows][stride]: queries, keys, values, [head_dim] each
    const float *cos, *sin;       // [rows][head_dim / 2], or NULL: nothing is rotated
    const float *q_norm, *k_norm; // [head_dim], or NULL
    void *cache;                  // one layer's, or NULL: keys are rotated in place
    float *scales;                // of an int8 cache
    const Run *runs;
    int64_t n_runs, rows, slot_rows, n_heads, kv_heads, head_dim;
    float eps;                    // of the norms
    int32_t dtype, cache_dtype;
} Rotary;

// One thread's rows, inside a task of the pool.
void KERNEL(rotate_part)(const Rotary *rotary, int thread, int n_threads);

// All rows, in the pool.
void KERNEL(rotate)(const Rotary *rotary);
