// What attention is given: see attention.c.
#pragma once

#include <stdint.h>

enum { INT8_CACHE = 3 };  // a cache's dtype beside those of vector.h

typedef struct {
    int64_t row, slot, start, length;
} Run;

typedef struct {
    const void *queries;  // [rows][query_stride], heads in front
    const void *cache;    // one layer's
    const float *scales;  // of an int8 cache
    void *out;            // [rows][heads * head_dim]
    const Run *runs;
    int64_t n_runs, query_stride, slot_rows, heads, kv_heads, head_dim;
    int32_t dtype, cache_dtype;  // of queries and out; of the cache
} Attention;
