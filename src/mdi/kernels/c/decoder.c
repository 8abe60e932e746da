// A stage's decoder layers over a packed batch, in one parallel region: threads meet at barriers and are never woken up.
//
//   hidden -> norm -> q, k, v -> rotation, cache -> attention -> out + hidden
//          -> norm -> gate, up (SwiGLU, GeGLU) -> down + hidden, or a mixture of experts + hidden
//
// Where a layer has norms of what is added to hidden, that is summed up and rounded by itself, then normalised and added.
//
// Where a group of ranks computes the stage, each adds up its own shards of what residuals are added to, and the calling
// thread exchanges these sums with the other ranks; all then add them in the same order.
//
// Each step is the part of a kernel that is also called by itself, so the bits are the same either way.
#include "decoder.h"

#include <stdlib.h>

#include "memory.h"
#include "norms.h"
#include "pool.h"
#include "rotary.h"
#include "vector.h"

typedef struct {
    const Step *step;
    void *normed, *qkv, *attended, *inner;  // [rows][..] of the step's dtype
    void *summed;                           // [rows][hidden_size]: what is normalised before it is added to hidden
    char *scratch;                          // of products and attention
    atomic_long *claimed;                   // [n_layers]
    int *failed;                            // what an exchange returned; written by one thread before a barrier
} Region;

enum { PIECE_ROWS = 288 };  // whose sums are sent while the next ones are computed; weights are read once for so many

static void normalise(const Region *region, const float *weight, int thread, int n_threads) {
    const Step *step = region->step;
    Norm norm = {.x = step->hidden, .out = region->normed, .weight = weight, .rows = step->rows,
                 .size = step->hidden_size, .eps = step->eps, .dtype = step->dtype};
    KERNEL(rms_norm_part)(&norm, thread, n_threads);
    mdi_barrier();
}

// hidden + norm of what is summed up; without a norm hidden has it already.
static void add_normalised(const Region *region, const float *weight, int thread, int n_threads) {
    const Step *step = region->step;
    if (!weight) return;
    Norm norm = {.x = region->summed, .out = step->hidden, .weight = weight, .residual = step->hidden, .rows = step->rows,
                 .size = step->hidden_size, .eps = step->eps, .dtype = step->dtype};
    KERNEL(rms_norm_part)(&norm, thread, n_threads);
    mdi_barrier();
}

static Product product_of(const Region *region, const Weight *weight, const void *x, void *out) {
    return (Product){.weight = weight, .x = x, .out = out, .rows = region->step->rows, .dtype = region->step->dtype,
                     .scratch = region->scratch};
}

static void multiply(const Region *region, const Weight *weight, const void *x, void *out, const float *bias, int thread,
                     int n_threads) {
    Product product = product_of(region, weight, x, out);
    product.bias = bias;
    KERNEL(product_part)(&product, thread, n_threads);
    mdi_barrier();
}

// All shards' sums, in order, and the residual, rounded once: of LANES numbers at a time, a thread's part of all rows.
INLINE void add_partials_as(const Step *step, const void *residual, void *out, long begin, long end, int dtype) {
    long size = step->rows * step->hidden_size;
    for (long at = begin; at < end; at += LANES) {
        int lanes = end - at < LANES ? (int)(end - at) : LANES;
        vfloat total = vf_load_few_as(step->partials, at, lanes, dtype);
        for (long shard = 1; shard < step->n_shards; shard++)
            total = vf_add(total, vf_load_few_as(step->partials, shard * size + at, lanes, dtype));
        if (residual) total = vf_add(total, vf_load_few_as(residual, at, lanes, dtype));
        vf_store_few_as(out, at, total, lanes, dtype);
    }
}

// Sums without a norm of their own go to hidden, the residual included.
static void *sum_of(const Region *region, const float *post_norm) { return post_norm ? region->summed : region->step->hidden; }
static void *residual_of(const Region *region, const float *post_norm) { return post_norm ? NULL : region->step->hidden; }

static void add_partials(const Region *region, const float *post_norm, int thread, int n_threads) {
    const Step *step = region->step;
    const void *residual = residual_of(region, post_norm);
    void *out = sum_of(region, post_norm);
    long size = step->rows * step->hidden_size, vectors = (size + LANES - 1) / LANES;
    long begin = vectors * thread / n_threads * LANES, end = vectors * (thread + 1) / n_threads * LANES;
    if (end > size) end = size;
    if (step->dtype == FLOAT32) add_partials_as(step, residual, out, begin, end, FLOAT32);
    if (step->dtype == BFLOAT16) add_partials_as(step, residual, out, begin, end, BFLOAT16);
    if (step->dtype == FLOAT16) add_partials_as(step, residual, out, begin, end, FLOAT16);
}

// Where this rank's sums of some rows begin.
static char *own_partials(const Step *step, long row) {
    long at = (step->first_shard * step->rows + row) * step->hidden_size;
    return (char *)step->partials + at * dtype_bytes(step->dtype);
}

// After what all threads have written of rows [first, last).
static void exchange(const Region *region, long first, long last, int thread) {
    mdi_barrier();
    if (thread == 0 && !*region->failed) *region->failed = region->step->exchange(first, last);
}

// After the last rows. Returns whether there is something to go on with.
static int exchanged(const Region *region, const float *post_norm, int thread, int n_threads) {
    mdi_barrier();
    if (*region->failed) return 0;
    add_partials(region, post_norm, thread, n_threads);
    mdi_barrier();
    return 1;
}

static int sum_products_of_ranks(const Region *region, Product product, const float *post_norm, int thread, int n_threads) {
    const Step *step = region->step;
    const char *x = product.x;
    long row_size = product.weight->inputs * dtype_bytes(step->dtype);
    product.shard_stride = step->rows * step->hidden_size;
    for (long first = 0, last; first < step->rows; first = last) {
        last = first + PIECE_ROWS < step->rows ? first + PIECE_ROWS : step->rows;
        product.x = x + first * row_size, product.out = own_partials(step, first), product.rows = last - first;
        KERNEL(product_part)(&product, thread, n_threads);
        exchange(region, first, last, thread);
    }
    return exchanged(region, post_norm, thread, n_threads);
}

// Returns whether there is something to go on with.
static int sum_product(const Region *region, const Weight *weight, const void *x, const Shards *shards,
                       const float *post_norm, int thread, int n_threads) {
    Product product = product_of(region, weight, x, sum_of(region, post_norm));
    product.shards = shards;
    if (region->step->exchange) return sum_products_of_ranks(region, product, post_norm, thread, n_threads);
    product.residual = residual_of(region, post_norm);
    KERNEL(product_part)(&product, thread, n_threads);
    mdi_barrier();
    return 1;
}

static void rotate(const Region *region, const Layer *layer, int thread, int n_threads) {
    const Step *step = region->step;
    Rotary rotary = {.heads = region->qkv, .cos = layer->cos, .sin = layer->sin,
                     .q_norm = layer->q_norm, .k_norm = layer->k_norm, .cache = layer->cache, .scales = layer->scales, .runs = step->runs,
                     .n_runs = step->n_runs, .rows = step->rows, .slot_rows = step->slot_rows, .n_heads = step->heads,
                     .kv_heads = step->kv_heads, .head_dim = step->head_dim, .eps = step->eps, .dtype = step->dtype,
                     .cache_dtype = step->cache_dtype};
    KERNEL(rotate_part)(&rotary, thread, n_threads);
    mdi_barrier();
}

static Attention attention_of(const Region *region, const Layer *layer) {
    const Step *step = region->step;
    long kv_size = step->kv_heads * step->head_dim, item = step->cache_dtype == INT8_CACHE ? 1 : dtype_bytes(step->cache_dtype);
    return (Attention){.queries = region->qkv, .keys = layer->cache, .values = (char *)layer->cache + kv_size * item,
                       .key_scales = layer->scales, .value_scales = layer->scales ? layer->scales + step->kv_heads : NULL,
                       .out = region->attended, .runs = step->runs, .n_runs = step->n_runs,
                       .query_stride = (step->heads + 2 * step->kv_heads) * step->head_dim, .key_stride = 2 * kv_size,
                       .slot_rows = step->slot_rows, .heads = step->heads, .kv_heads = step->kv_heads,
                       .head_dim = step->head_dim, .dtype = step->dtype, .cache_dtype = step->cache_dtype,
                       .causal = 1, .window = layer->window, .scratch = region->scratch};
}

static void attend(const Region *region, const Layer *layer, int thread, int n_threads) {
    Attention attention = attention_of(region, layer);
    attention.claimed = region->claimed + (layer - region->step->layers);
    KERNEL(attention_part)(&attention, thread, n_threads);
    mdi_barrier();
}

static Mixture mixture_of(const Region *region, const Layer *layer) {
    const Step *step = region->step;
    const float *post_norm = layer->mlp_post_norm;
    Mixture mixture = {.experts = layer->experts, .x = region->normed, .residual = residual_of(region, post_norm),
                       .out = sum_of(region, post_norm), .rows = step->rows, .dtype = step->dtype, .shards = step->expert_down, .scratch = region->scratch};
    if (!step->exchange) return mixture;
    mixture.out = own_partials(step, 0);
    mixture.shard_stride = step->rows * step->hidden_size;
    return mixture;
}

static int mix(const Region *region, const Layer *layer, int thread, int n_threads) {
    Mixture mixture = mixture_of(region, layer);
    KERNEL(mixture_part)(&mixture, thread, n_threads);
    if (!region->step->exchange) {
        mdi_barrier();
        return 1;
    }
    exchange(region, 0, region->step->rows, thread);
    return exchanged(region, layer->mlp_post_norm, thread, n_threads);
}

static int sum_mlp(const Region *region, const Layer *layer, int thread, int n_threads) {
    if (layer->experts) return mix(region, layer, thread, n_threads);
    multiply(region, layer->gate_up, region->normed, region->inner, NULL, thread, n_threads);
    return sum_product(region, layer->down, region->inner, region->step->down, layer->mlp_post_norm, thread, n_threads);
}

static void decoder_part(void *context, int thread, int n_threads) {
    const Region *region = context;
    const Step *step = region->step;
    for (const Layer *layer = step->layers; layer < step->layers + step->n_layers; layer++) {
        normalise(region, layer->input_norm, thread, n_threads);
        multiply(region, layer->qkv, region->normed, region->qkv, layer->qkv_bias, thread, n_threads);
        rotate(region, layer, thread, n_threads);
        attend(region, layer, thread, n_threads);
        const float *post_norm = layer->attention_post_norm;
        if (!sum_product(region, layer->out, region->attended, step->out, post_norm, thread, n_threads)) return;
        add_normalised(region, post_norm, thread, n_threads);
        normalise(region, layer->mlp_norm, thread, n_threads);
        if (!sum_mlp(region, layer, thread, n_threads)) return;
        add_normalised(region, layer->mlp_post_norm, thread, n_threads);
    }
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t scratch_size(const Region *region) {
    const Step *step = region->step;
    Attention attention = attention_of(region, step->layers);
    size_t size = KERNEL(attention_scratch)(&attention, mdi_threads());
    for (const Layer *layer = step->layers; layer < step->layers + step->n_layers; layer++) {
        const Weight *weights[] = {layer->qkv, layer->out, layer->gate_up, layer->down};
        for (int i = 0; i < (layer->experts ? 2 : 4); i++) {
            Product product = product_of(region, weights[i], NULL, NULL);
            if (i == 1) product.shards = step->out;
            if (i == 3) product.shards = step->down;
            size = larger(size, KERNEL(product_scratch)(&product, mdi_threads()));
        }
        if (!layer->experts) continue;
        Mixture mixture = mixture_of(region, layer);
        size = larger(size, KERNEL(mixture_scratch)(&mixture, mdi_threads()));
    }
    return size;
}

// Inner width of the widest layer without experts.
static long inner_width(const Step *step) {
    long widest = 0;
    for (const Layer *layer = step->layers; layer < step->layers + step->n_layers; layer++)
        if (!layer->experts && layer->down->inputs > widest) widest = layer->down->inputs;
    return widest;
}

// Whether some layer has norms of what is added to hidden.
static int has_post_norms(const Step *step) {
    for (const Layer *layer = step->layers; layer < step->layers + step->n_layers; layer++)
        if (layer->attention_post_norm || layer->mlp_post_norm) return 1;
    return 0;
}

static size_t row_bytes(const Step *step, long numbers) {
    return (step->rows * numbers * dtype_bytes(step->dtype) + 63) & ~(size_t)63;
}

int KERNEL(decoder)(const Step *step) {
    if (!step->n_layers || !step->rows) return 0;
    Region region = {.step = step};
    size_t normed = row_bytes(step, step->hidden_size), attended = row_bytes(step, step->heads * step->head_dim);
    size_t qkv = row_bytes(step, (step->heads + 2 * step->kv_heads) * step->head_dim), inner = row_bytes(step, inner_width(step));
    size_t summed = has_post_norms(step) ? normed : 0;
    size_t counters = (step->n_layers * sizeof(atomic_long) + 63) & ~(size_t)63;
    char *memory = mdi_scratch(counters + normed + qkv + attended + inner + summed + scratch_size(&region));
    if (!memory) return NO_MEMORY;
    int failed = 0;
    region.failed = &failed;
    memset(memory, 0, counters);
    region.claimed = (atomic_long *)memory;
    region.normed = memory += counters;
    region.qkv = memory += normed;
    region.attended = memory += qkv;
    region.inner = memory += attended;
    region.summed = memory += inner;
    region.scratch = memory + summed;
    mdi_parallel(decoder_part, &region);
    return failed ? NOT_EXCHANGED : 0;
}
