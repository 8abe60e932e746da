// Products for any number of rows. A row has the same bits in each of them: every output has one accumulator, to which the
// inputs are added in order. Blocks of inputs and of rows only say when an accumulator is in registers and when in memory.
//
//   activations -> packed by all threads: tiles of rows, in float32, bfloat16 or int8
//   panels      -> each thread has its own, also of several products; few rows read two panels at once
//   sums        -> scaled, rounded and added over shards, then bias, activation and residual, rounded once
#include "activations.h"
#include "float_products.h"
#include "int_products.h"
#include "memory.h"
#include "pool.h"
#if defined(MDI_AMX)
#include "tile_products.h"
#else
static int takes_tiles(const Product *product) { return (void)product, 0; }
static void begin_tiles(const Product *product) { (void)product; }
static void tiles_release(void) {}
static void multiply_tiles(const Work *work, const char *panel, long first, long rows, long begin, long end) {
    (void)work, (void)panel, (void)first, (void)rows, (void)begin, (void)end;
}
#endif

static size_t aligned(size_t size) { return (size + 63) & ~(size_t)63; }

// The activations' places in memory that begins at `at`. Returns their size.
static size_t place_activations(const Product *product, char *at, Activations *x) {
    const Weight *weight = product->weight;
    x->inputs = weight->kind == BFLOAT16 ? (weight->inputs + 1) / 2 * 2 : weight->inputs;
    x->in_pairs = HAS_BF16_DOT && weight->kind == BFLOAT16 && product->dtype == BFLOAT16;
    x->on_tiles = takes_tiles(product);
    x->tile_rows = x->on_tiles ? 16 : TILE_ROWS;
    size_t numbers = (size_t)(product->rows * x->inputs);
    x->floats = (float *)at;
    if (!weight->group) return aligned(numbers * sizeof(float));
    size_t values = aligned(numbers), scales = aligned(numbers / (size_t)weight->group * sizeof(float));
    x->values = (int8_t *)at;
    x->scales = (float *)(at + values);
    x->sums = (int32_t *)(at + values + scales);
    return values + 2 * scales;
}

enum { THREAD_SIZE = 2 * SUMS_SIZE + BLOCK_SIZE, MOST_FILLING = 3 * 64 };  // of a product's activations: see `aligned`

size_t KERNEL(product_scratch)(const Product *product, int n_threads) {
    Activations x;
    return place_activations(product, NULL, &x) + (size_t)n_threads * THREAD_SIZE;
}

size_t KERNEL(products_scratch)(long rows, long inputs, long count, int n_threads) {
    size_t activations = (size_t)(rows * (inputs + 1)) * sizeof(float);  // quantised ones are smaller
    return activations + (size_t)count * MOST_FILLING + (size_t)n_threads * THREAD_SIZE;
}

INLINE vfloat activated(vfloat value, int activation) {
    if (activation == GELU) return vf_gelu(value);
    if (activation == QUICK_GELU) return vf_mul(value, vf_sigmoid(vf_mul(value, vf_set1(1.702f))));
    if (activation == TANH_GELU) return vf_tanh_gelu(value);
    if (activation == SILU) return vf_mul(value, vf_sigmoid(value));
    return value;
}

// Writes one row of one panel. outputs: of the result. column: the panel's first one of these.
INLINE void finish_row(const Product *product, void *out, const float *sums, long row, long column, long outputs, int dtype) {
    int gate = product->weight->gate, vectors = gate ? PANEL_VECTORS / 2 : PANEL_VECTORS;
    for (int v = 0; v < vectors && column < outputs; v++, column += LANES) {
        int lanes = outputs - column < LANES ? (int)(outputs - column) : LANES;
        vfloat value = vf_load(sums + v * LANES);
        if (product->bias) value = vf_add(value, vf_load_few_as(product->bias, column, lanes, FLOAT32));
        if (gate) {
            vfloat up = vf_load(sums + (vectors + v) * LANES);
            if (product->bias) up = vf_add(up, vf_load_few_as(product->bias, outputs + column, lanes, FLOAT32));
            value = vf_mul(activated(value, gate), up);
        }
        value = activated(value, product->activation);
        long index = row * outputs + column;
        if (product->residual) value = vf_add(value, vf_load_few_as(product->residual, index, lanes, dtype));
        vf_store_few_as(out, index, value, lanes, dtype);
    }
}

static void finish(const Product *product, void *out, const float *sums, long panel, long first, long rows) {
    int gate = product->weight->gate;
    long column = panel * (gate ? PANEL / 2 : PANEL), outputs = product->weight->outputs / (gate ? 2 : 1);
    for (long r = 0; r < rows; r++, sums += PANEL) {
        if (product->dtype == FLOAT32) finish_row(product, out, sums, first + r, column, outputs, FLOAT32);
        if (product->dtype == BFLOAT16) finish_row(product, out, sums, first + r, column, outputs, BFLOAT16);
        if (product->dtype == FLOAT16) finish_row(product, out, sums, first + r, column, outputs, FLOAT16);
    }
}

INLINE void add_rounded_as(float *totals, const float *sums, long count, int dtype) {
    for (long i = 0; i < count; i += LANES)
        vf_store(totals + i, vf_add(vf_load(totals + i), vf_round_as(vf_load(sums + i), dtype)));
}

static void add_rounded(float *totals, const float *sums, long count, int dtype) {
    if (dtype == FLOAT32) add_rounded_as(totals, sums, count, FLOAT32);
    if (dtype == BFLOAT16) add_rounded_as(totals, sums, count, BFLOAT16);
    if (dtype == FLOAT16) add_rounded_as(totals, sums, count, FLOAT16);
}

// int8 with one scale an output.
static void scale_sums(const Weight *weight, float *sums, long panel, long rows) {
    for (long i = 0; i < rows * PANEL; i += LANES)
        vf_store(sums + i, vf_mul(vf_load(sums + i), vf_load(weight->scales + panel * PANEL + i % PANEL)));
}

typedef struct {  // rows [first, first + rows) of one panel, or of two that lie `apart` panels from each other
    long panel, apart, first, rows;
} Place;

// Floats of the sums of a place.
static long sums_size(Place at) { return (at.apart ? SUMS_JUMP : 0) + at.rows * PANEL; }

// The sums of inputs [from, to).
static void sum_inputs(const Work *work, Place at, long from, long to) {
    const Weight *weight = work->weight;
    int panels = at.apart ? 2 : 1;
    long jump = at.apart * (long)weight->panel_size;
    const char *begin = weight->panels + (size_t)at.panel * weight->panel_size;
    memset(work->sums, 0, (size_t)sums_size(at) * sizeof(float));
    if (work->x.on_tiles) multiply_tiles(work, begin, at.first, at.rows, from, to);
    else if (weight->group) multiply_ints(work, panels, begin, jump, at.first, at.rows, from, to);
    else multiply_floats(work, panels, begin, jump, at.first, at.rows, from, to);
    if (weight->scales) scale_sums(weight, work->sums, at.panel, at.rows);
    if (weight->scales && at.apart) scale_sums(weight, work->sums + SUMS_JUMP, at.panel + at.apart, at.rows);
}

static void finish_place(const Product *product, void *out, const float *sums, Place at) {
    finish(product, out, sums, at.panel, at.first, at.rows);
    if (at.apart) finish(product, out, sums + SUMS_JUMP, at.panel + at.apart, at.first, at.rows);
}

// Each shard's sums by themselves, or their total: it begins with -0, to which a sum is added without a change.
static void compute_shards(const Work *work, Place at) {
    const Product *product = work->product;
    const Shards *shards = product->shards;
    long size = sums_size(at), stride = product->shard_stride * dtype_bytes(product->dtype);
    for (long i = 0; i < size; i += LANES) vf_store(work->totals + i, vf_set1(-0.0f));
    for (long shard = 0; shard < shards->count; shard++) {
        long to = shard + 1 < shards->count ? shards->bounds[shard + 1] : work->x.inputs;
        sum_inputs(work, at, shards->bounds[shard], to);
        if (stride) finish_place(product, (char *)product->out + shard * stride, work->sums, at);
        else add_rounded(work->totals, work->sums, size, product->dtype);
    }
    if (!stride) finish_place(product, product->out, work->totals, at);
}

static void compute(const Work *work, long panel, long apart, long first, long rows) {
    Place at = {panel, apart, first, rows};
    if (work->product->shards) {
        compute_shards(work, at);
        return;
    }
    sum_inputs(work, at, 0, work->x.inputs);
    finish_place(work->product, work->product->out, work->sums, at);
}

// Panels [begin, end).
static void multiply_panels(const Work *work, long begin, long end) {
    const Product *product = work->product;
    if (product->rows <= FEW_ROWS) {
        long half = (end - begin + 1) / 2;
        for (long panel = begin; panel < begin + half; panel++)
            compute(work, panel, panel + half < end ? half : 0, 0, product->rows);
        return;
    }
    for (long first = 0; first < product->rows; first += ROWS_AT_ONCE) {
        long rows = product->rows - first < ROWS_AT_ONCE ? product->rows - first : ROWS_AT_ONCE;
        for (long panel = begin; panel < end; panel++) compute(work, panel, 0, first, rows);
    }
}

static void pack_activations(const Product *product, const Activations *x, int thread, int n_threads) {
    if (product->weight->group) quantize_activations(product, x, thread, n_threads);
    else if (x->on_tiles) pack_steps(product, x, thread, n_threads);
    else if (x->in_pairs) pack_pairs(product, x, thread, n_threads);
    else pack_floats(product, x, thread, n_threads);
}

// What a panel costs beside others: with few rows its bytes, then its rows.
static long panel_cost(const Product *product) { return product->rows + 8; }

// The first of a product's panels that costs before it leave to a thread.
static long panel_at(const Product *product, long cost) {
    long panel = cost / panel_cost(product), n_panels = product->weight->n_panels;
    return cost < 0 ? 0 : panel < n_panels ? panel : n_panels;
}

void KERNEL(products_part)(const Product *products, long count, int thread, int n_threads) {
    char *own = products->scratch + (size_t)thread * THREAD_SIZE;
    char *packed = products->scratch + (size_t)n_threads * THREAD_SIZE, *at = packed;
    long cost = 0;
    for (long i = 0; i < count; i++) {
        Activations x;
        size_t size = place_activations(&products[i], at, &x);
        pack_activations(&products[i], &x, thread, n_threads);
        cost += products[i].weight->n_panels * panel_cost(&products[i]);
        at += size;
    }
    mdi_barrier();
    at = packed;
    long begin = cost * thread / n_threads, end = cost * (thread + 1) / n_threads;
    for (long i = 0; i < count; i++) {
        const Product *product = &products[i];
        Work work = {.product = product, .weight = product->weight, .sums = (float *)own};
        work.totals = (float *)(own + SUMS_SIZE);
        work.block = own + 2 * SUMS_SIZE;
        at += place_activations(product, at, &work.x);
        long first = panel_at(product, begin), last = panel_at(product, end);
        begin -= product->weight->n_panels * panel_cost(product);
        end -= product->weight->n_panels * panel_cost(product);
        if (first == last) continue;
        if (work.x.on_tiles) begin_tiles(product);
        multiply_panels(&work, first, last);
        if (work.x.on_tiles) tiles_release();
    }
}

void KERNEL(product_part)(const Product *product, int thread, int n_threads) {
    KERNEL(products_part)(product, 1, thread, n_threads);
}

static void run_part(void *product, int thread, int n_threads) { KERNEL(product_part)(product, thread, n_threads); }

int KERNEL(product)(const Weight *weight, const void *x, void *out, long rows, int dtype, const float *bias,
                    const void *residual, int activation, const Shards *shards, int64_t shard_stride) {
    Product product = {.weight = weight, .x = x, .out = out, .bias = bias, .residual = residual, .rows = rows,
                       .dtype = dtype, .activation = activation, .shards = shards, .shard_stride = shard_stride};
    product.scratch = mdi_scratch(KERNEL(product_scratch)(&product, mdi_threads()));
    if (!product.scratch) return 1;
    mdi_parallel(run_part, &product);
    return 0;
}
