// What a thread works with while it computes its panels of a product.
#pragma once

#include "products.h"
#include "vector.h"

enum {
    PANEL_VECTORS = PANEL / LANES,
    ROWS_AT_ONCE = 288,  // a multiple of every height of a tile; their floats stay in the second cache
    SUMS_JUMP = TILE_ROWS * PANEL,  // floats between the sums of two panels that are computed together
    SUMS_SIZE = ROWS_AT_ONCE * PANEL * sizeof(float),
    FETCH_ROWS = 3,  // for more, the processor is busy enough
    BLOCK_SIZE = 256 * PANEL * sizeof(float),  // bytes of a panel's part that is unpacked for many rows
};

// Activations of a product, in tiles of rows, for all threads.
typedef struct {
    long inputs;     // filled up to whole steps of a panel
    int in_pairs;    // bfloat16 is multiplied in pairs: see vf_dot_bf16
    int on_tiles;    // see tile_products.h
    int tile_rows;   // TILE_ROWS, or 16 on tiles
    float *floats;   // [inputs][rows], for float weights; in pairs [inputs / 2][rows][2] bfloat16; on tiles [inputs / 32][rows][32]
    int8_t *values;  // [inputs / 4][rows][4], for quantised ones: x = value * scale; on tiles [groups][rows][group]
    float *scales;   // [groups][rows]
    int32_t *sums;   // [groups][rows]: of the values; for weights without offsets, what a sum of the group begins with
} Activations;

typedef struct {
    const Product *product;
    const Weight *weight;
    Activations x;
    float *sums;    // [ROWS_AT_ONCE][PANEL]
    float *totals;  // like sums, over shards
    char *block;
} Work;

enum { STEP_BYTES = 64 };  // of a row, that are multiplied at once on tiles
enum { GROUP4 = 32 };  // inputs of a group of an int4 weight

// Bytes in a panel: of an int4 offset, of what stands before a group's values, and of a group.
INLINE long offset4_size(int offsets) { return offsets == ZEROS ? 1 : offsets == MINIMUMS ? 2 : 0; }
INLINE long head4_size(int offsets) { return PANEL * (2 + offset4_size(offsets)); }
INLINE long group4_size(int offsets) { return head4_size(offsets) + PANEL * GROUP4 / 2; }
INLINE long head8_size(const Weight *weight) {
    return weight->group_scales ? 4 * PANEL * (weight->offsets == MINIMUMS ? 2 : 1) : 0;
}
INLINE long group8_size(const Weight *weight) { return head8_size(weight) + (long)weight->group * PANEL; }

INLINE int tile_rows(const Activations *x, long rows, long first) {
    return rows - first < x->tile_rows ? (int)(rows - first) : x->tile_rows;
}

INLINE float *sums_of(float *sums, int row, int vector) {
    return sums + vector / PANEL_VECTORS * SUMS_JUMP + row * PANEL + vector % PANEL_VECTORS * LANES;
}

// The processor alone does not read far enough ahead for few rows: a tenth of their time, except with int8. Fetches what
// follows `size` bytes of each panel by 1 KiB.
INLINE void fetch_ahead(const char *w, long jump, int panels, long size) {
    UNROLL for (int panel = 0; panel < panels; panel++)
        for (long at = 0; at < size; at += 64) __builtin_prefetch(w + panel * jump + 1024 + at);
}

// A vector of a step of a panel, where a step has step_size bytes; of the second panel behind the first one's.
INLINE const char *weights_of(const char *w, long jump, long step_size, int vector) {
    return w + vector / PANEL_VECTORS * jump + vector % PANEL_VECTORS * (step_size / PANEL_VECTORS);
}
