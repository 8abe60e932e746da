// Packs weights into panels, on all threads: see products.h for the layout.
#include <stdlib.h>

#include "memory.h"
#include "pool.h"
#include "work.h"

typedef struct {
    Weight *weight;
    const char *values;
    const void *scales;
    const uint8_t *zeros;
    const void *minimums;
    int has_nan;
} Packing;

static size_t panel_size(const Weight *weight) {
    long inputs = weight->inputs;
    if (weight->kind == INT8) return (size_t)(inputs / weight->group * group8_size(weight));
    if (weight->kind == INT4) return (size_t)(inputs / GROUP4 * group4_size(weight->offsets));
    if (weight->kind == FLOAT32) return (size_t)inputs * PANEL * 4;
    if (weight->kind == FLOAT16) return (size_t)inputs * PANEL * 2;
    return (size_t)(inputs + 1) / 2 * PANEL * 4;
}

// The row of the weight that is output n of a panel, or -1 behind the last one.
static long source_row(const Weight *weight, long panel, int n) {
    if (!weight->gate) return panel * PANEL + n < weight->outputs ? panel * PANEL + n : -1;
    long inner = weight->outputs / 2, row = panel * (PANEL / 2) + n % (PANEL / 2);
    if (row >= inner) return -1;
    return n < PANEL / 2 ? row : inner + row;
}

static int is_nan(uint32_t bits, int kind) {
    if (kind == FLOAT32) return (bits & 0x7fffffff) > 0x7f800000;
    return (bits & 0x7fff) > (kind == BFLOAT16 ? 0x7f80 : 0x7c00);
}

static int pack_float32(const Weight *weight, const uint32_t *from, int n, uint32_t *panel) {
    int has_nan = 0;
    for (long k = 0; k < weight->inputs; k++) {
        panel[k * PANEL + n] = from[k];
        has_nan |= is_nan(from[k], FLOAT32);
    }
    return has_nan;
}

// In steps of 1 (float16) or 2 inputs (bfloat16).
INLINE int pack_halves(const Weight *weight, const uint16_t *from, int n, uint16_t *panel, int kind) {
    int step = kind == BFLOAT16 ? 2 : 1, has_nan = 0;
    for (long k = 0; k < weight->inputs; k++) {
        panel[k / step * step * PANEL + n * step + k % step] = from[k];
        has_nan |= is_nan(from[k], kind);
    }
    return has_nan;
}

// Output n of a panel, which is row `row` of the weight.
static int pack_int8(const Packing *packing, long row, long panel, int n) {
    const Weight *weight = packing->weight;
    const int8_t *from = (const int8_t *)packing->values + row * weight->inputs;
    const float *scales = packing->scales, *minimums = packing->minimums;
    char *to = weight->panels + (size_t)panel * weight->panel_size;
    int has_nan = 0;
    if (!weight->group_scales) {
        weight->scales[panel * PANEL + n] = scales[row];
        has_nan = scales[row] != scales[row];
    }
    for (long k = 0; k < weight->inputs; k += weight->group, to += weight->group * PANEL) {
        if (weight->group_scales) {
            long group = (row * weight->inputs + k) / weight->group;
            ((float *)to)[n] = scales[group];
            has_nan |= scales[group] != scales[group];
            if (minimums) {
                ((float *)to)[PANEL + n] = minimums[group];
                has_nan |= minimums[group] != minimums[group];
            }
            to += head8_size(weight);
        }
        for (int i = 0; i < weight->group; i++)
            to[i / 4 * 4 * PANEL + 4 * n + i % 4] = (char)(from[k + i] + WEIGHT_OFFSET);
    }
    return has_nan;
}

static int pack_int4(const Packing *packing, long row, long panel, int n) {
    const Weight *weight = packing->weight;
    long groups = weight->inputs / GROUP4;
    const uint8_t *from = (const uint8_t *)packing->values + row * weight->inputs / 2;
    const uint16_t *scales = (const uint16_t *)packing->scales + row * groups;
    const uint16_t *minimums = packing->minimums ? (const uint16_t *)packing->minimums + row * groups : NULL;
    char *to = weight->panels + (size_t)panel * weight->panel_size;
    int has_nan = 0;
    for (long g = 0; g < groups; g++, from += GROUP4 / 2, to += group4_size(weight->offsets)) {
        ((uint16_t *)to)[n] = scales[g];
        has_nan |= is_nan(scales[g], FLOAT16);
        if (packing->zeros) to[2 * PANEL + n] = (char)packing->zeros[row * groups + g];
        if (minimums) {
            ((uint16_t *)to)[PANEL + n] = minimums[g];
            has_nan |= is_nan(minimums[g], FLOAT16);
        }
        char *bytes = to + head4_size(weight->offsets);
        for (int i = 0; i < GROUP4 / 2; i++) {
            int k = i / 4 * 8 + i % 4;  // and k + 4
            int low = from[k / 2] >> 4 * (k % 2) & 15, high = from[(k + 4) / 2] >> 4 * (k % 2) & 15;
            bytes[i / 4 * 4 * PANEL + 4 * n + i % 4] = (char)(low | high << 4);
        }
    }
    return has_nan;
}

static int pack_floats(const Packing *packing, long row, long panel, int n) {
    const Weight *weight = packing->weight;
    void *to = weight->panels + (size_t)panel * weight->panel_size;
    const char *from = packing->values + row * weight->inputs * dtype_bytes(weight->kind);
    if (weight->kind == FLOAT32) return pack_float32(weight, (const uint32_t *)from, n, to);
    if (weight->kind == FLOAT16) return pack_halves(weight, (const uint16_t *)from, n, to, FLOAT16);
    return pack_halves(weight, (const uint16_t *)from, n, to, BFLOAT16);
}

static void pack_part(void *context, int thread, int n_threads) {
    Packing *packing = context;
    const Weight *weight = packing->weight;
    int has_nan = 0;
    long begin = weight->n_panels * thread / n_threads, end = weight->n_panels * (thread + 1) / n_threads;
    for (long panel = begin; panel < end; panel++)
        for (int n = 0; n < PANEL; n++) {
            long row = source_row(weight, panel, n);
            if (row < 0) continue;
            if (weight->kind == INT8) has_nan |= pack_int8(packing, row, panel, n);
            else if (weight->kind == INT4) has_nan |= pack_int4(packing, row, panel, n);
            else has_nan |= pack_floats(packing, row, panel, n);
        }
    if (has_nan) __atomic_store_n(&packing->has_nan, 1, __ATOMIC_RELAXED);
}

Weight *KERNEL(pack)(long outputs, long inputs, int kind, int group, int gate, int group_scales, const void *values,
                     const void *scales, const uint8_t *zeros, const void *minimums, const int32_t *order, int *has_nan) {
    Weight *weight = calloc(1, sizeof *weight);
    if (!weight) return NULL;
    *weight = (Weight){.outputs = outputs, .inputs = inputs, .kind = kind, .group = group, .gate = gate,
                       .group_scales = group_scales,
                       .offsets = minimums ? MINIMUMS : zeros ? ZEROS : NO_OFFSETS};
    long in_panel = gate ? PANEL / 2 : PANEL, columns = gate ? outputs / 2 : outputs;
    weight->n_panels = (columns + in_panel - 1) / in_panel;
    weight->panel_size = panel_size(weight);
    weight->panels = mdi_allocate((size_t)weight->n_panels * weight->panel_size);
    if (kind == INT8 && !group_scales) weight->scales = calloc((size_t)(weight->n_panels * PANEL), sizeof(float));
    if (order) weight->order = malloc((size_t)inputs * sizeof *order);
    if (!weight->panels || (kind == INT8 && !group_scales && !weight->scales) || (order && !weight->order)) {
        KERNEL(discard)(weight);
        return NULL;
    }
    if (order) memcpy(weight->order, order, (size_t)inputs * sizeof *order);
    Packing packing = {.weight = weight, .values = values, .scales = scales, .zeros = zeros, .minimums = minimums};
    mdi_parallel(pack_part, &packing);
    *has_nan = packing.has_nan;
    return weight;
}

void KERNEL(discard)(Weight *weight) {
    if (weight->panels) mdi_free(weight->panels);
    free(weight->scales);
    free(weight->order);
    free(weight);
}
