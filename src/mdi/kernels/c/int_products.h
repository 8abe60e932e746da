// Products of int8 and int4 weights with quantised activations: exact integer sums within a group of inputs, which are
// scaled and added in order. The tiles are those of float_products.h, in parts of INT_ROWS rows: registers hold the
// integer sums and the scaled ones.
#pragma once

#include "work.h"

enum { BLOCK8 = 1024, BLOCK4 = 512, DIRECT_ROWS4 = 2 * TILE_ROWS };  // inputs of a block

// Activations of some rows of a tile: see work.h.
typedef struct {
    const int8_t *values;
    const float *scales;
    const int32_t *sums;
    long stride;  // rows of the tile
} Tile;

INLINE vint broadcast(const int8_t *four) {
    int32_t bits;
    memcpy(&bits, four, sizeof bits);
    return vi_set1(bits);
}

// Compilers keep loaded activations for the next vector of weights, and then have no registers for the sums.
INLINE void load_anew(void) { __asm__ volatile("" : : : "memory"); }

// What a group's integer sum begins with. x_sum: as `first_sum` leaves it.
INLINE int32_t first_dot(int kind, int offsets, int32_t x_sum) {
    if (!offsets) return x_sum;
    return kind == INT8 ? -WEIGHT_OFFSET * x_sum : 0;
}

// Adds a group's integer sum, scaled by its activations' scale and its weights', and what offsets add to it.
INLINE vfloat add_group(int group_scales, int offsets, vfloat total, float x_scale, int32_t x_sum, vfloat offset,
                        vfloat scale, vfloat sum) {
    if (!group_scales) return vf_fma(total, vf_set1(x_scale), sum);
    if (offsets == ZEROS) total = vf_sub(total, vf_mul(offset, vf_set1((float)x_sum)));  // exact: below 2^24
    sum = vf_fma(vf_mul(total, vf_set1(x_scale)), scale, sum);
    return offsets == MINIMUMS ? vf_fma(offset, vf_set1(x_scale * (float)x_sum), sum) : sum;
}

#if defined(HAS_ROW_PAIRS)
// The dot products of an even number of rows with so many inputs, a multiple of 8, of a panel of int8.
INLINE void add_row_pairs(int rows, Tile x, const char *w, long inputs, vint dot[INT_ROWS][2 * PANEL_VECTORS]) {
    vint sum[INT_ROWS / 2][2 * PANEL_VECTORS];
    UNROLL for (int pair = 0; pair < rows / 2; pair++)
        UNROLL for (int v = 0; v < 2 * PANEL_VECTORS; v++) sum[pair][v] = vi_zero();
    for (const char *end = w + inputs * PANEL; w < end; w += 8 * PANEL, x.values += 8 * x.stride)
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {
            vint first = vi_load(weights_of(w, 0, 4 * PANEL, v)), second = vi_load(weights_of(w + 4 * PANEL, 0, 4 * PANEL, v));
            vint low = vi_two_outputs(first, second, 0), high = vi_two_outputs(first, second, 1);
            UNROLL for (int pair = 0; pair < rows / 2; pair++) {
                vint two = vi_two_rows(x.values + 8 * pair, x.values + 4 * x.stride + 8 * pair);
                sum[pair][2 * v] = vi_dot_rows(sum[pair][2 * v], two, low);
                sum[pair][2 * v + 1] = vi_dot_rows(sum[pair][2 * v + 1], two, high);
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++)
            dot[r][v] = vi_add(dot[r][v], vi_row_of(sum[r / 2][2 * v], sum[r / 2][2 * v + 1], r % 2));
}
#else
#define HAS_ROW_PAIRS 0
INLINE void add_row_pairs(int rows, Tile x, const char *w, long inputs, vint dot[INT_ROWS][2 * PANEL_VECTORS]) {
    (void)rows, (void)x, (void)w, (void)inputs, (void)dot;
}
#endif

INLINE void int8_tile(const Weight *weight, int rows, int panels, Tile x, const char *w, long jump, long groups, float *sums) {
    int group = weight->group, group_scales = weight->group_scales, offsets = weight->offsets;
    int vectors = panels * PANEL_VECTORS;
    long head = head8_size(weight);
    vfloat sum[INT_ROWS][2 * PANEL_VECTORS], scales[2 * PANEL_VECTORS], minimums[2 * PANEL_VECTORS];
    vint dot[INT_ROWS][2 * PANEL_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_load(sums_of(sums, r, v));
    for (long g = 0; g < groups; g++, x.scales += x.stride, x.sums += x.stride) {
        UNROLL for (int v = 0; v < vectors; v++) {
            const float *from = (const float *)weights_of(w, jump, 4 * PANEL, v);
            scales[v] = group_scales ? vf_load(from) : vf_zero();
            minimums[v] = offsets ? vf_load(from + PANEL) : vf_zero();
        }
        w += head;
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) dot[r][v] = vi_set1(first_dot(INT8, offsets, x.sums[r]));
        const char *end = w + group * PANEL;
        if (HAS_ROW_PAIRS && rows % 2 == 0 && panels == 1 && group % 8 == 0) {
            add_row_pairs(rows, x, w, group, dot);
            x.values += group * x.stride;
            w = end;
        } else do {  // the group is never empty, which saves copies of the sums
            UNROLL for (int v = 0; v < vectors; v++) {
                vint weights = vi_load(weights_of(w, jump, 4 * PANEL, v));
                UNROLL for (int r = 0; r < rows; r++) dot[r][v] = vi_dot(dot[r][v], weights, broadcast(x.values + 4 * r));
                load_anew();
            }
            x.values += 4 * x.stride;
            w += 4 * PANEL;
        } while (w < end);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) {
                vfloat total = vi_to_float(dot[r][v]);
                sum[r][v] = add_group(group_scales, offsets, total, x.scales[r], x.sums[r], minimums[v], scales[v], sum[r][v]);
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) vf_store(sums_of(sums, r, v), sum[r][v]);
}

INLINE vfloat load_offsets4(int offsets, const char *from) {
    if (offsets == ZEROS) return vf_load_uint8((const uint8_t *)from);
    return offsets == MINIMUMS ? vf_load_f16((const uint16_t *)from) : vf_zero();
}

// Unpacked, a group of an int4 panel has [PANEL] float32 scales and offsets, and [8][PANEL][4] bytes.
enum { UNPACKED4 = PANEL * (4 + 4 + GROUP4) };

INLINE void unpack4(const char *w, int offsets, long groups, char *to) {
    for (long g = 0; g < groups; g++, w += group4_size(offsets), to += UNPACKED4) {
        const char *bytes = w + head4_size(offsets);
        for (int n = 0; n < PANEL; n += LANES) {
            vf_store((float *)to + n, vf_load_f16((const uint16_t *)w + n));
            vf_store((float *)to + PANEL + n, load_offsets4(offsets, w + 2 * PANEL + n * offset4_size(offsets)));
            for (int step = 0; step < 4; step++) {
                vint both = vi_load(bytes + step * 4 * PANEL + 4 * n);
                vi_store(to + 8 * PANEL + 2 * step * 4 * PANEL + 4 * n, vi_low_nibbles(both));
                vi_store(to + 8 * PANEL + (2 * step + 1) * 4 * PANEL + 4 * n, vi_high_nibbles(both));
            }
        }
    }
}

// unpacked: as `unpack4` leaves it.
INLINE void int4_tile(int unpacked, int offsets, int rows, int panels, Tile x, const char *w, long jump, long groups,
                      float *sums) {
    int vectors = panels * PANEL_VECTORS;
    long head = unpacked ? 8 * PANEL : head4_size(offsets), size = unpacked ? UNPACKED4 : group4_size(offsets);
    vfloat sum[INT_ROWS][2 * PANEL_VECTORS];
    vint dot[INT_ROWS][2 * PANEL_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_load(sums_of(sums, r, v));
    for (long g = 0; g < groups; g++, x.scales += x.stride, x.sums += x.stride, x.values += GROUP4 * x.stride, w += size) {
        if (!unpacked && rows <= FETCH_ROWS) fetch_ahead(w, jump, panels, size);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++) dot[r][v] = vi_set1(first_dot(INT4, offsets, x.sums[r]));
        int pairs = HAS_ROW_PAIRS && unpacked && rows % 2 == 0 && panels == 1;
        if (pairs) add_row_pairs(rows, x, w + head, GROUP4, dot);
        for (int step = 0; !pairs && step < (unpacked ? 8 : 4); step++)
            UNROLL for (int v = 0; v < vectors; v++) {
                vint bytes = vi_load(weights_of(w + head + step * 4 * PANEL, jump, 4 * PANEL, v));
                vint low = unpacked ? bytes : vi_low_nibbles(bytes), high = vi_high_nibbles(bytes);
                const int8_t *values = x.values + (unpacked ? 4 : 8) * x.stride * step;
                UNROLL for (int r = 0; r < rows; r++) dot[r][v] = vi_dot_small(dot[r][v], low, broadcast(values + 4 * r));
                load_anew();
                if (!unpacked)
                    UNROLL for (int r = 0; r < rows; r++)
                        dot[r][v] = vi_dot_small(dot[r][v], high, broadcast(values + 4 * x.stride + 4 * r));
                load_anew();
            }
        UNROLL for (int v = 0; v < vectors; v++) {
            const char *from = weights_of(w, jump, unpacked ? 4 * PANEL : 2 * PANEL, v);
            vfloat scale = unpacked ? vf_load((const float *)from) : vf_load_f16((const uint16_t *)from), offset = vf_zero();
            if (offsets && unpacked) offset = vf_load((const float *)(from + 4 * PANEL));
            if (offsets && !unpacked)
                offset = load_offsets4(offsets, weights_of(w + 2 * PANEL, jump, PANEL * offset4_size(offsets), v));
            UNROLL for (int r = 0; r < rows; r++) {
                vfloat total = vi_to_float(vi_small_total(dot[r][v]));
                sum[r][v] = add_group(1, offsets, total, x.scales[r], x.sums[r], offset, scale, sum[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) vf_store(sums_of(sums, r, v), sum[r][v]);
}

typedef enum { WHOLE_BYTES, NIBBLES, UNPACKED } Layout;

INLINE void int_tile(Layout layout, int rows, int panels, Tile x, const char *w, long jump, long groups, const Weight *weight,
                     float *sums) {
    if (layout == WHOLE_BYTES) int8_tile(weight, rows, panels, x, w, jump, groups, sums);
    if (layout == NIBBLES) int4_tile(0, weight->offsets, rows, panels, x, w, jump, groups, sums);
    if (layout == UNPACKED) int4_tile(1, weight->offsets, rows, panels, x, w, jump, groups, sums);
}

INLINE void int_tile_of(Layout layout, int rows, int panels, Tile x, const char *w, long jump, long groups,
                        const Weight *weight, float *sums) {
    switch (rows) {
        case 1: int_tile(layout, 1, panels, x, w, jump, groups, weight, sums); break;
        case 2: if ((panels == 1 ? INT_ROWS : FEW_ROWS) >= 2) int_tile(layout, 2, panels, x, w, jump, groups, weight, sums); break;
        case 3: if ((panels == 1 ? INT_ROWS : FEW_ROWS) >= 3) int_tile(layout, 3, panels, x, w, jump, groups, weight, sums); break;
        case 4: if (INT_ROWS >= 4) int_tile(layout, 4, 1, x, w, jump, groups, weight, sums); break;
        case 5: if (INT_ROWS >= 5) int_tile(layout, 5, 1, x, w, jump, groups, weight, sums); break;
        case 6: if (INT_ROWS >= 6) int_tile(layout, 6, 1, x, w, jump, groups, weight, sums); break;
    }
}

// Adds inputs [begin, end), whose weights are at w, to the sums of rows from `first` on.
INLINE void int_tiles(const Work *work, Layout layout, int panels, const char *w, long jump, long first, long rows, long begin,
                      long end) {
    int group = work->weight->group;
    long groups = work->x.inputs / group;
    for (long row = first; row < first + rows; row += work->x.tile_rows) {
        int count = tile_rows(&work->x, work->product->rows, row);
        long at = row * groups + begin / group * count;
        const int8_t *values = work->x.values + row * work->x.inputs + begin * count;
        for (int r = 0; r < count; r += INT_ROWS) {
            int some = count - r < INT_ROWS ? count - r : INT_ROWS;
            Tile x = {values + 4 * r, work->x.scales + at + r, work->x.sums + at + r, count};
            float *sums = work->sums + (row - first + r) * PANEL;
            if (panels == 2 && FEW_ROWS) int_tile_of(layout, some, 2, x, w, jump, (end - begin) / group, work->weight, sums);
            else int_tile_of(layout, some, 1, x, w, jump, (end - begin) / group, work->weight, sums);
        }
    }
}

static void multiply_int8(const Work *work, int panels, const char *panel, long jump, long first, long rows,
                          long begin, long end) {
    int group = work->weight->group;
    long size = group8_size(work->weight);
    long block = rows <= INT_ROWS ? end - begin : BLOCK8 / group * group;
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + block < end ? k + block : end;
        int_tiles(work, WHOLE_BYTES, panels, panel + k / group * size, jump, first, rows, k, stop);
    }
}

static void multiply_int4(const Work *work, int panels, const char *panel, long jump, long first, long rows,
                          long begin, long end) {
    int offsets = work->weight->offsets;
    long size = group4_size(offsets);
    if (rows <= DIRECT_ROWS4) {
        const char *w = panel + begin / GROUP4 * size;
        int_tiles(work, NIBBLES, panels, w, jump, first, rows, begin, end);
        return;
    }
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + BLOCK4 < end ? k + BLOCK4 : end;
        unpack4(panel + k / GROUP4 * size, offsets, (stop - k) / GROUP4, work->block);
        int_tiles(work, UNPACKED, 1, work->block, 0, first, rows, k, stop);
    }
}

static void multiply_ints(const Work *work, int panels, const char *panel, long jump, long first, long rows, long begin,
                          long end) {
    if (work->weight->kind == INT8) multiply_int8(work, panels, panel, jump, first, rows, begin, end);
    else multiply_int4(work, panels, panel, jump, first, rows, begin, end);
}
