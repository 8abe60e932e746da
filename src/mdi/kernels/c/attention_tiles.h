// Tiles of attention: scores of some queries and PANEL keys, and values mixed by weights, PANEL channels at a time. Keys
// and values are given in panels of float32, made of the cache in its dtype; few rows read values in the cache itself.
//
//   keys    [head_dim][PANEL keys]     a score is one accumulator, channels in order
//   values  [BLOCK keys][PANEL channels]  a channel is one accumulator, keys in order
#pragma once

#include "vector.h"

enum { BLOCK = 64, VECTORS = PANEL / LANES, INT8_NUMBERS = 3, LARGEST_TILE = 6 };

typedef struct {  // keys or values of one head, from the first key of a block on
    const void *numbers;
    long at, stride, n_keys, head_dim;  // in numbers
    int dtype;
} Rows;

typedef struct {  // what is fetched while few rows compute: a little in each step, as many fetches at once hold them up
    const char *from;
    long step;  // bytes
} Ahead;

INLINE void fetch(const Ahead *ahead, long steps) {
    const char *from = ahead->from + steps * ahead->step;
    __builtin_prefetch(from);
    if (PANEL > 32) __builtin_prefetch(from + ahead->step / 2);
}

// Rows of the next tile, where so many are left: no tile is much smaller than the others.
INLINE long tile_rows_of(long left) {
    if (left >= 2 * TILE_ROWS) return TILE_ROWS;
    long rows = left > TILE_ROWS ? (left + 1) / 2 : left;
    return rows == 5 ? 3 : rows;
}

INLINE vfloat load_numbers(const void *from, long index, int dtype) {
    return dtype == INT8_NUMBERS ? vf_load_int8((const int8_t *)from + index) : vf_load_as(from, index, dtype);
}

INLINE float load_number(const void *from, long index, int dtype) {
    return dtype == INT8_NUMBERS ? (float)((const int8_t *)from)[index] : load_as(from, index, dtype);
}

// LANES words of a row, each of one float32, two bfloat16 or four int8; float16 becomes float32.
INLINE vint load_words(const void *from, long index, int dtype) {
    if (dtype == INT8_NUMBERS) return vi_load((const int8_t *)from + index);
    if (dtype == BFLOAT16) return vi_load((const uint16_t *)from + index);
    float numbers[LANES];
    vf_store(numbers, vf_load_as(from, index, dtype));
    return vi_load(numbers);
}

INLINE void store_words(float *panel, vint words, int dtype) {
    if (dtype == INT8_NUMBERS) {
        for (int i = 0; i < 4; i++) vf_store(panel + i * PANEL, vi_to_float(vi_byte(words, i)));
    } else if (dtype == BFLOAT16) {
        vf_store(panel, vf_low_bf16(words));
        vf_store(panel + PANEL, vf_high_bf16(words));
    } else {
        vi_store(panel, words);
    }
}

// PANEL keys from `first` on; where the block ends before, the last one again.
INLINE void pack_keys_as(const Rows *keys, long first, float *panel, int dtype) {
    long numbers = dtype == INT8_NUMBERS ? 4 : dtype == BFLOAT16 ? 2 : 1, head_dim = keys->head_dim;
    for (long key = first; key < keys->n_keys && key < first + PANEL; key += LANES, panel += LANES) {
        long at[LANES], d = 0;
        for (int i = 0; i < LANES; i++)
            at[i] = keys->at + (key + i < keys->n_keys ? key + i : keys->n_keys - 1) * keys->stride;
        for (; d + LANES * numbers <= head_dim; d += LANES * numbers) {
            vint words[LANES];
            UNROLL for (int i = 0; i < LANES; i++) words[i] = load_words(keys->numbers, at[i] + d, dtype);
            vi_transpose(words);
            UNROLL for (int i = 0; i < LANES; i++) store_words(panel + (d + i * numbers) * PANEL, words[i], dtype);
        }
        for (; d < head_dim; d++)
            for (int i = 0; i < LANES; i++) panel[d * PANEL + i] = load_number(keys->numbers, at[i] + d, dtype);
    }
}

static void pack_keys(const Rows *keys, long first, float *panel) {
    switch (keys->dtype) {
        case FLOAT32: pack_keys_as(keys, first, panel, FLOAT32); break;
        case BFLOAT16: pack_keys_as(keys, first, panel, BFLOAT16); break;
        case FLOAT16: pack_keys_as(keys, first, panel, FLOAT16); break;
        case INT8_NUMBERS: pack_keys_as(keys, first, panel, INT8_NUMBERS); break;
    }
}

// PANEL channels from `first` on of all keys, zeros behind head_dim.
INLINE void pack_values_as(const Rows *values, long first, float *panel, int dtype) {
    long end = values->head_dim - first;
    for (long key = 0, at = values->at + first; key < values->n_keys; key++, at += values->stride, panel += PANEL) {
        long d = 0;
        for (; d + LANES <= end && d < PANEL; d += LANES)
            vf_store(panel + d, load_numbers(values->numbers, at + d, dtype));
        for (; d < PANEL; d++) panel[d] = d < end ? load_number(values->numbers, at + d, dtype) : 0.0f;
    }
}

static void pack_values(const Rows *values, long first, float *panel) {
    switch (values->dtype) {
        case FLOAT32: pack_values_as(values, first, panel, FLOAT32); break;
        case BFLOAT16: pack_values_as(values, first, panel, BFLOAT16); break;
        case FLOAT16: pack_values_as(values, first, panel, FLOAT16); break;
        case INT8_NUMBERS: pack_values_as(values, first, panel, INT8_NUMBERS); break;
    }
}

INLINE void score_tile(const float *queries, long width, const float *keys, long head_dim, float *scores,
                       const Ahead *ahead, int n_rows) {
    vfloat sums[LARGEST_TILE][VECTORS];
    UNROLL for (int row = 0; row < n_rows; row++)
        UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = vf_zero();
    for (long d = 0; d < head_dim; d++, keys += PANEL) {
        if (ahead) fetch(ahead, d);
        vfloat key[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) key[v] = vf_load(keys + v * LANES);
        UNROLL for (int row = 0; row < n_rows; row++) {
            vfloat query = vf_set1(queries[row * width + d]);
            UNROLL for (int v = 0; v < VECTORS; v++) sums[row][v] = vf_fma(query, key[v], sums[row][v]);
        }
    }
    UNROLL for (int row = 0; row < n_rows; row++)
        UNROLL for (int v = 0; v < VECTORS; v++) vf_store(scores + row * BLOCK + v * LANES, sums[row][v]);
}

INLINE void score_rows_of(const float *queries, long width, const float *keys, long head_dim, long rows, float *scores,
                       Ahead *ahead) {
    for (long n; rows > 0; rows -= n, queries += n * width, scores += n * BLOCK) {
        n = tile_rows_of(rows);
        switch (n) {
            case 6: score_tile(queries, width, keys, head_dim, scores, ahead, 6); break;
            case 4: score_tile(queries, width, keys, head_dim, scores, ahead, 4); break;
            case 3: score_tile(queries, width, keys, head_dim, scores, ahead, 3); break;
            case 2: score_tile(queries, width, keys, head_dim, scores, ahead, 2); break;
            case 1: score_tile(queries, width, keys, head_dim, scores, ahead, 1); break;
        }
        if (ahead) ahead->from += head_dim * ahead->step;
    }
}

// scores [rows][BLOCK] of a panel's keys.
static void score_rows(const float *queries, long width, const float *keys, long head_dim, long rows, float *scores,
                       Ahead *ahead) {
    if (ahead) score_rows_of(queries, width, keys, head_dim, rows, scores, ahead);
    else score_rows_of(queries, width, keys, head_dim, rows, scores, NULL);
}

typedef struct {  // rows that mix values: mixed = mixed * kept + weights x values
    const float *weights, *kept;  // [rows][BLOCK]; [rows], or NULL for 1
    const int *seen;              // [rows]: the keys of a row, no fewer than those of the row before
    float *mixed;                 // [rows][width]
    long width, rows;
} Mix;

INLINE void value_tile(Mix mix, const Rows *values, long first, long last, const Ahead *ahead, int n_rows, int n_vectors,
                       int dtype) {
    vfloat sums[LARGEST_TILE][VECTORS];
    long at = values->at + first * values->stride, stride = values->stride;
    UNROLL for (int row = 0; row < n_rows; row++)
        UNROLL for (int v = 0; v < n_vectors; v++) {
            vfloat before = vf_load(mix.mixed + row * mix.width + v * LANES);
            sums[row][v] = mix.kept ? vf_mul(before, vf_set1(mix.kept[row])) : before;
        }
    for (long key = first; key < last; key++, at += stride) {
        if (ahead) fetch(ahead, key - first);
        vfloat value[VECTORS];
        UNROLL for (int v = 0; v < n_vectors; v++) value[v] = load_numbers(values->numbers, at + v * LANES, dtype);
        UNROLL for (int row = 0; row < n_rows; row++) {
            vfloat weight = vf_set1(mix.weights[row * BLOCK + key]);
            UNROLL for (int v = 0; v < n_vectors; v++) sums[row][v] = vf_fma(weight, value[v], sums[row][v]);
        }
    }
    UNROLL for (int row = 0; row < n_rows; row++)
        UNROLL for (int v = 0; v < n_vectors; v++) vf_store(mix.mixed + row * mix.width + v * LANES, sums[row][v]);
}

INLINE Mix mix_from(Mix mix, long row) {
    return (Mix){mix.weights + row * BLOCK, mix.kept + row, mix.seen + row, mix.mixed + row * mix.width, mix.width,
                 mix.rows - row};
}

// A tile's rows over the keys that all of them see, then each over the rest of its own.
INLINE void mix_vectors(Mix mix, const Rows *values, Ahead *ahead, int n_vectors, int dtype) {
    for (long n; mix.rows > 0; mix = mix_from(mix, n)) {
        n = tile_rows_of(mix.rows);
        int seen = mix.seen[0];
        switch (n) {
            case 6: value_tile(mix, values, 0, seen, ahead, 6, n_vectors, dtype); break;
            case 4: value_tile(mix, values, 0, seen, ahead, 4, n_vectors, dtype); break;
            case 3: value_tile(mix, values, 0, seen, ahead, 3, n_vectors, dtype); break;
            case 2: value_tile(mix, values, 0, seen, ahead, 2, n_vectors, dtype); break;
            case 1: value_tile(mix, values, 0, seen, ahead, 1, n_vectors, dtype); break;
        }
        for (long row = 1; mix.seen[n - 1] > seen && row < n; row++) {
            Mix rest = mix_from(mix, row);
            rest.kept = NULL;
            if (rest.seen[0] > seen) value_tile(rest, values, seen, rest.seen[0], NULL, 1, n_vectors, dtype);
        }
        if (ahead) ahead->from += seen * ahead->step;
    }
}

// n_vectors of channels of a panel of values.
static void mix_panel(Mix mix, Rows values, long n_vectors) {
    if (n_vectors >= VECTORS) mix_vectors(mix, &values, NULL, VECTORS, FLOAT32);
    else
        for (long v = 0; v < n_vectors; v++, values.at += LANES, mix.mixed += LANES)
            mix_vectors(mix, &values, NULL, 1, FLOAT32);
}

// PANEL channels of values in the cache.
static void mix_in_place(Mix mix, const Rows *values, Ahead *ahead) {
    switch (values->dtype) {
        case FLOAT32: mix_vectors(mix, values, ahead, VECTORS, FLOAT32); break;
        case BFLOAT16: mix_vectors(mix, values, ahead, VECTORS, BFLOAT16); break;
        case FLOAT16: mix_vectors(mix, values, ahead, VECTORS, FLOAT16); break;
        case INT8_NUMBERS: mix_vectors(mix, values, ahead, VECTORS, INT8_NUMBERS); break;
    }
}
