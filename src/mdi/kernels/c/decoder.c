// A stage's decoder layers over a packed batch, in one parallel region: threads meet at barriers and are never woken up.
//
//   hidden -> norm -> q, k, v -> rotation, cache -> attention -> out + hidden
//          -> norm -> gate, up (SwiGLU, GeGLU) -> down + hidden, or a mixture of experts + hidden
//
// Where a layer has norms of what is added to hidden, that is summed up and rounded by itself, then normalised and added.
//
// Where a group of ranks computes the stage, each adds up its own shards of what residuals are added to, and the calling
// thread exchanges these sums with the other ranks; all then add them in the same order. Many rows go in pieces: while
// their sums are on the way, others are computed, of this product and of the next ones up to attention.
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

typedef struct {
    long first, last;
} Rows;

// Of a group's step: while their sums are on the way, the next ones are computed. Products read weights once for so many.
enum { PIECE_ROWS = 288 };

static Rows all_rows(const Step *step) { return (Rows){0, step->rows}; }
static int in_pieces(const Step *step) { return step->exchange && step->rows > PIECE_ROWS; }

// The piece after this one; the first, after none. A step that exchanges nothing has one.
static int next_piece(const Step *step, Rows *rows) {
    long most = in_pieces(step) ? PIECE_ROWS : step->rows, left = step->rows - rows->last;
    *rows = (Rows){rows->last, rows->last + (left < most ? left : most)};
    return left > 0;
}

static char *row_of(const Step *step, void *rows, long row, long numbers) {
    return (char *)rows + row * numbers * dtype_bytes(step->dtype);
}

static void normalise(const Region *region, Rows rows, const float *weight, int thread, int n_threads) {
    const Step *step = region->step;
    long size = step->hidden_size;
    Norm norm = {.x = row_of(step, step->hidden, rows.first, size), .out = row_of(step, region->normed, rows.first, size),
                 .weight = weight, .rows = rows.last - rows.first, .size = size, .eps = step->eps, .dtype = step->dtype};
    KERNEL(rms_norm_part)(&norm, thread, n_threads);
    mdi_barrier();
}

// hidden + norm of what is summed up.
static void add_normalised(const Region *region, Rows rows, const float *weight, int thread, int n_threads) {
    const Step *step = region->step;
    long size = step->hidden_size;
    char *hidden = row_of(step, step->hidden, rows.first, size);
    Norm norm = {.x = row_of(step, region->summed, rows.first, size), .out = hidden, .weight = weight, .residual = hidden,
                 .rows = rows.last - rows.first, .size = size, .eps = step->eps, .dtype = step->dtype};
    KERNEL(rms_norm_part)(&norm, thread, n_threads);
    mdi_barrier();
}

static Product product_of(const Region *region, Rows rows, const Weight *weight, void *x, void *out) {
    const Step *step = region->step;
    long outputs = weight->outputs / (weight->gate ? 2 : 1);
    return (Product){.weight = weight, .x = row_of(step, x, rows.first, weight->inputs),
                     .out = row_of(step, out, rows.first, outputs), .rows = rows.last - rows.first, .dtype = step->dtype,
                     .scratch = region->scratch};
}

static void multiply(const Region *region, Rows rows, const Weight *weight, void *x, void *out, const float *bias,
                     int thread, int n_threads) {
    Product product = product_of(region, rows, weight, x, out);
    product.bias = bias;
    KERNEL(product_part)(&product, thread, n_threads);
    mdi_barrier();
}

// Where sums go: those without a norm of their own to hidden, the residual included.
static void *sum_of(const Region *region, const float *post_norm) { return post_norm ? region->summed : region->step->hidden; }
static void *residual_of(const Region *region, const float *post_norm) { return post_norm ? NULL : region->step->hidden; }

typedef struct {
    const Step *step;
    const void *partials, *residual;  // residual: or NULL
    void *out;
} Addition;

// All shards' sums, in order, and the residual, rounded once: of LANES numbers at a time.
INLINE void add_partials_as(const Addition *addition, long begin, long end, int dtype) {
    const Step *step = addition->step;
    long size = step->rows * step->hidden_size;
    for (long at = begin; at < end; at += LANES) {
        int lanes = end - at < LANES ? (int)(end - at) : LANES;
        vfloat total = vf_load_few_as(addition->partials, at, lanes, dtype);
        for (long shard = 1; shard < step->n_shards; shard++)
            total = vf_add(total, vf_load_few_as(addition->partials, shard * size + at, lanes, dtype));
        if (addition->residual) total = vf_add(total, vf_load_few_as(addition->residual, at, lanes, dtype));
        vf_store_few_as(addition->out, at, total, lanes, dtype);
    }
}

// A thread's part of the rows.
static void add_partials(const Addition *addition, Rows rows, int thread, int n_threads) {
    const Step *step = addition->step;
    long first = rows.first * step->hidden_size, last = rows.last * step->hidden_size;
    long vectors = (last - first + LANES - 1) / LANES;
    long begin = first + vectors * thread / n_threads * LANES, end = first + vectors * (thread + 1) / n_threads * LANES;
    if (end > last) end = last;
    if (step->dtype == FLOAT32) add_partials_as(addition, begin, end, FLOAT32);
    if (step->dtype == BFLOAT16) add_partials_as(addition, begin, end, BFLOAT16);
    if (step->dtype == FLOAT16) add_partials_as(addition, begin, end, FLOAT16);
}

// Sums of one product, [n_shards][rows][hidden_size]. Where all rows are exchanged at once, all products have the same.
static char *partials_of(const Step *step, int which) {
    return row_of(step, step->partials, in_pieces(step) ? which * step->n_shards * step->rows : 0, step->hidden_size);
}

static char *own_partials(const Step *step, int which) {
    return row_of(step, partials_of(step, which), step->first_shard * step->rows, step->hidden_size);
}

static void exchange(const Region *region, int what, int which, Rows rows) {
    if (!*region->failed) *region->failed = region->step->exchange(what, which, rows.first, rows.last);
}

// What all threads have written of these rows.
static void send(const Region *region, int which, Rows rows, int thread) {
    mdi_barrier();
    if (thread == 0) exchange(region, in_pieces(region->step) ? SEND : SEND_AND_RECEIVE, which, rows);
}

// Of these rows, all ranks' sums. Returns whether there is something to go on with.
static int receive(const Region *region, int which, Rows rows, const float *post_norm, int thread, int n_threads) {
    const Step *step = region->step;
    if (thread == 0 && in_pieces(step)) exchange(region, RECEIVE, which, rows);
    mdi_barrier();
    if (*region->failed) return 0;
    Addition addition = {.step = step, .partials = partials_of(step, which), .residual = residual_of(region, post_norm),
                         .out = sum_of(region, post_norm)};
    add_partials(&addition, rows, thread, n_threads);
    mdi_barrier();
    return 1;
}

// Hidden states get what `sum_product` or `mix` summed up, where they have not got it yet. Returns as `receive` does.
static int add_sums(const Region *region, int which, Rows rows, const float *post_norm, int thread, int n_threads) {
    if (region->step->exchange && !receive(region, which, rows, post_norm, thread, n_threads)) return 0;
    if (post_norm) add_normalised(region, rows, post_norm, thread, n_threads);
    return 1;
}

static void sum_product(const Region *region, int which, Rows rows, const Weight *weight, void *x, const Shards *shards,
                        const float *post_norm, int thread, int n_threads) {
    const Step *step = region->step;
    void *out = step->exchange ? own_partials(step, which) : sum_of(region, post_norm);
    Product product = product_of(region, rows, weight, x, out);
    product.shards = shards;
    if (step->exchange) product.shard_stride = step->rows * step->hidden_size;
    else product.residual = residual_of(region, post_norm);
    KERNEL(product_part)(&product, thread, n_threads);
    if (step->exchange) send(region, which, rows, thread);
    else mdi_barrier();
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
                       .out = sum_of(region, post_norm), .rows = step->rows, .dtype = step->dtype,
                       .shards = step->expert_down, .scratch = region->scratch};
    if (!step->exchange) return mixture;
    mixture.out = own_partials(step, INNER);
    mixture.shard_stride = step->rows * step->hidden_size;
    return mixture;
}

// Experts read their weights once for all rows.
static void mix(const Region *region, const Layer *layer, int thread, int n_threads) {
    Mixture mixture = mixture_of(region, layer);
    KERNEL(mixture_part)(&mixture, thread, n_threads);
    if (region->step->exchange) send(region, INNER, all_rows(region->step), thread);
    else mdi_barrier();
}

// What the layer before this one, or the last one of all, still owes to hidden states.
static int end_layer_before(const Region *region, const Layer *layer, Rows rows, int thread, int n_threads) {
    if (layer == region->step->layers) return 1;
    return add_sums(region, INNER, rows, layer[-1].mlp_post_norm, thread, n_threads);
}

static int attention_of_layer(const Region *region, const Layer *layer, int thread, int n_threads) {
    const Step *step = region->step;
    for (Rows rows = {0}; next_piece(step, &rows);) {
        if (!end_layer_before(region, layer, rows, thread, n_threads)) return 0;
        normalise(region, rows, layer->input_norm, thread, n_threads);
        multiply(region, rows, layer->qkv, region->normed, region->qkv, layer->qkv_bias, thread, n_threads);
    }
    rotate(region, layer, thread, n_threads);
    attend(region, layer, thread, n_threads);
    for (Rows rows = {0}; next_piece(step, &rows);)
        sum_product(region, ATTENTION, rows, layer->out, region->attended, step->out, layer->attention_post_norm, thread,
                    n_threads);
    return 1;
}

static int mlp_of_layer(const Region *region, const Layer *layer, int thread, int n_threads) {
    const Step *step = region->step;
    for (Rows rows = {0}; next_piece(step, &rows);) {
        if (!add_sums(region, ATTENTION, rows, layer->attention_post_norm, thread, n_threads)) return 0;
        normalise(region, rows, layer->mlp_norm, thread, n_threads);
        if (layer->experts) continue;
        multiply(region, rows, layer->gate_up, region->normed, region->inner, NULL, thread, n_threads);
        sum_product(region, INNER, rows, layer->down, region->inner, step->down, layer->mlp_post_norm, thread, n_threads);
    }
    if (layer->experts) mix(region, layer, thread, n_threads);
    return 1;
}

static void decoder_part(void *context, int thread, int n_threads) {
    const Region *region = context;
    const Step *step = region->step;
    const Layer *layer = step->layers, *end = layer + step->n_layers;
    for (; layer < end; layer++) {
        if (!attention_of_layer(region, layer, thread, n_threads)) return;
        if (!mlp_of_layer(region, layer, thread, n_threads)) return;
    }
    end_layer_before(region, end, all_rows(step), thread, n_threads);
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t scratch_size(const Region *region) {
    const Step *step = region->step;
    Attention attention = attention_of(region, step->layers);
    size_t size = KERNEL(attention_scratch)(&attention, mdi_threads());
    for (const Layer *layer = step->layers; layer < step->layers + step->n_layers; layer++) {
        const Weight *weights[] = {layer->qkv, layer->out, layer->gate_up, layer->down};
        for (int i = 0; i < (layer->experts ? 2 : 4); i++) {
            Product product = {.weight = weights[i], .rows = step->rows, .dtype = step->dtype};
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
