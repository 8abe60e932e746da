// Packs weights into panels, on all threads: see products.h for the layout.
#include <stdlib.h>

#include "memory.h"
#include "pool.h"
#include "tiles.h"

typedef struct {
    Weight *weight;
    const char *values;
    const void *scales;
    const uint8_t *zeros;
    int has_nan;
} Packing;

static size_t panel_size(const Weight *weight) {
    long inputs = weight->inputs;
    if (weight->kind == FLOAT32) return (size_t)inputs * PANEL * 4;
    if (weight->kind == FLOAT16) return (size_t)inputs * PANEL * 2;
    return (size_t)(inputs + 1) / 2 * PANEL * 4;
}

// The row of the weight that is output n of a panel, or -1 behind the last one.
static long source_row(const Weight *weight, long panel, int n) {
    if (!weight->swiglu) return panel * PANEL + n < weight->outputs ? panel * PANEL + n : -1;
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

static void pack_part(void *context, int thread, int n_threads) {
    Packing *packing = context;
    const Weight *weight = packing->weight;
    int has_nan = 0;
    long begin = weight->n_panels * thread / n_threads, end = weight->n_panels * (thread + 1) / n_threads;
    for (long panel = begin; panel < end; panel++)
        for (int n = 0; n < PANEL; n++) {
            long row = source_row(weight, panel, n);
            if (row < 0) continue;
            void *to = weight->panels + (size_t)panel * weight->panel_size;
            const char *from = packing->values + row * weight->inputs * dtype_bytes(weight->kind);
            if (weight->kind == FLOAT32) has_nan |= pack_float32(weight, (const uint32_t *)from, n, to);
            if (weight->kind == FLOAT16) has_nan |= pack_halves(weight, (const uint16_t *)from, n, to, FLOAT16);
            if (weight->kind == BFLOAT16) has_nan |= pack_halves(weight, (const uint16_t *)from, n, to, BFLOAT16);
        }
    if (has_nan) __atomic_store_n(&packing->has_nan, 1, __ATOMIC_RELAXED);
}

Weight *KERNEL(pack)(long outputs, long inputs, int kind, int group, int swiglu, int group_scales, const void *values,
                     const void *scales, const uint8_t *zeros, int *has_nan) {
    Weight *weight = calloc(1, sizeof *weight);
    if (!weight) return NULL;
    *weight = (Weight){.outputs = outputs, .inputs = inputs, .kind = kind, .group = group, .swiglu = swiglu,
                       .group_scales = group_scales, .has_zeros = zeros != NULL};
    long in_panel = swiglu ? PANEL / 2 : PANEL, columns = swiglu ? outputs / 2 : outputs;
    weight->n_panels = (columns + in_panel - 1) / in_panel;
    weight->panel_size = panel_size(weight);
    weight->size = (size_t)weight->n_panels * weight->panel_size;
    weight->panels = mdi_allocate(weight->size);
    if (!weight->panels) {
        free(weight);
        return NULL;
    }
    Packing packing = {.weight = weight, .values = values, .scales = scales, .zeros = zeros};
    mdi_parallel(pack_part, &packing);
    *has_nan = packing.has_nan;
    return weight;
}

void KERNEL(discard)(Weight *weight) {
    mdi_free(weight->panels, weight->size);
    free(weight->scales);
    free(weight);
}
