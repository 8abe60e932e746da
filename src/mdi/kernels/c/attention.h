// What attention is given: see attention.c.
#pragma once

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

enum { INT8_CACHE = 3 };  // a dtype of keys and values beside those of vector.h

typedef struct {
    int64_t row, slot, start, length;
} Run;

typedef struct {
    const void *queries;                     // [rows][query_stride]
    const void *keys, *values;               // of slot 0: [key_stride] apart, [head_dim] a head
    const float *key_scales, *value_scales;  // of int8: 2 * kv_heads apart
    void *out;                               // [rows][heads * head_dim]
    const Run *runs;
    int64_t n_runs, query_stride, key_stride, slot_rows, heads, kv_heads, head_dim;
    int32_t dtype, cache_dtype;  // of queries and out; of keys and values
    int32_t causal;              // else every row attends to all slot_rows keys of its slot
    int64_t window;              // of a causal row: the last keys that it attends to, its own included; 0 is all
    char *scratch;
    atomic_long *claimed;  // items of work that threads have taken: 0 at first
} Attention;

// Bytes of scratch memory that it needs in a pool of so many threads.
size_t KERNEL(attention_scratch)(const Attention *call, int n_threads);

// One thread's part, inside a task of the pool; may have a barrier inside.
void KERNEL(attention_part)(const Attention *call, int thread, int n_threads);

// The whole of it, in the pool: sets scratch and claimed. Returns 0, or 1 where memory is short.
int KERNEL(attention)(Attention *call);
