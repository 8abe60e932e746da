// Products for any number of rows. A row has the same bits in each of them: every output has one accumulator, to which the
// inputs are added in order. Blocks of inputs and of rows only say when an accumulator is in registers and when in memory.
//
//   activations -> packed by all threads: tiles of TILE_ROWS rows, [inputs][rows] float32
//   panels      -> each thread has its own; few rows read two panels at once, many rows take blocks of BLOCK_INPUTS
//   sums        -> scaled, added over shards, then bias, activation and residual, rounded once
#include "memory.h"
#include "pool.h"
#include "tiles.h"

enum { BLOCK_INPUTS = 256, DIRECT_ROWS = 2 * TILE_ROWS };

typedef struct {
    const Product *product;
    const Weight *weight;
    const float *x;  // packed activations
    long inputs;     // filled up to whole steps of a panel
    float *sums, *totals, *block;
} Work;

static size_t aligned(size_t size) { return (size + 63) & ~(size_t)63; }

static long filled_inputs(const Weight *weight) { return weight->inputs + (weight->kind == BFLOAT16 ? weight->inputs & 1 : 0); }

static size_t activations_size(const Product *product) {
    return aligned((size_t)(product->rows * filled_inputs(product->weight)) * sizeof(float));
}

enum { SUMS_SIZE = ROWS_AT_ONCE * PANEL * sizeof(float), BLOCK_SIZE = BLOCK_INPUTS * PANEL * sizeof(float) };

size_t KERNEL(product_scratch)(const Product *product, int n_threads) {
    return activations_size(product) + (size_t)n_threads * (2 * SUMS_SIZE + BLOCK_SIZE);
}

INLINE int tile_rows(long rows, long first) { return rows - first < TILE_ROWS ? (int)(rows - first) : TILE_ROWS; }

// Inputs [begin, end) of one tile of rows.
INLINE void pack_rows(const void *x, long stride, long first, int rows, long begin, long end, float *packed, int dtype) {
    for (int r = 0; r < rows; r++) {
        long from = (first + r) * stride, k = begin;
        for (; k + LANES <= end; k += LANES) {
            vfloat values = vf_load_as(x, from + k, dtype);
            if (rows == 1) {
                vf_store(packed + k, values);
                continue;
            }
            float lanes[LANES];
            vf_store(lanes, values);
            for (int i = 0; i < LANES; i++) packed[(k + i) * rows + r] = lanes[i];
        }
        for (; k < end; k++) packed[k * rows + r] = load_as(x, from + k, dtype);
    }
}

static void pack_activations(const Product *product, float *packed, int thread, int n_threads) {
    long inputs = product->weight->inputs, filled = filled_inputs(product->weight);
    long begin = inputs * thread / n_threads, end = inputs * (thread + 1) / n_threads;
    for (long first = 0; first < product->rows; first += TILE_ROWS) {
        int rows = tile_rows(product->rows, first);
        float *tile = packed + first * filled;
        if (product->dtype == FLOAT32) pack_rows(product->x, inputs, first, rows, begin, end, tile, FLOAT32);
        if (product->dtype == BFLOAT16) pack_rows(product->x, inputs, first, rows, begin, end, tile, BFLOAT16);
        if (product->dtype == FLOAT16) pack_rows(product->x, inputs, first, rows, begin, end, tile, FLOAT16);
        if (end == inputs)
            for (long k = inputs * rows; k < filled * rows; k++) tile[k] = 0;
    }
}

// A block of a panel as float32, for many rows.
static void unpack(int kind, const char *panel, long begin, long end, float *block) {
    for (long k = begin; k < end; k++, block += PANEL)
        for (int v = 0; v < PANEL_VECTORS; v++) {
            if (kind == FLOAT16) vf_store(block + v * LANES, vf_load_f16((const uint16_t *)panel + k * PANEL + v * LANES));
            if (kind == BFLOAT16) {
                vint pair = vi_load(panel + k / 2 * 4 * PANEL + v * 4 * LANES);
                vf_store(block + v * LANES, k % 2 ? vf_high_bf16(pair) : vf_low_bf16(pair));
            }
        }
}

static void float_tiles(const Work *work, int kind, int panels, const char *w, long jump, long first, long rows, long begin,
                        long end) {
    for (long row = first; row < first + rows; row += TILE_ROWS) {
        int count = tile_rows(work->product->rows, row);
        const float *x = work->x + row * work->inputs + begin * count;
        float *sums = work->sums + (row - first) * PANEL;
        if (panels == 2) float_tile_of(kind, count, 2, x, w, jump, end - begin, sums);
        else float_tile_of(kind, count, 1, x, w, jump, end - begin, sums);
    }
}

// Adds inputs [begin, end) to the sums of rows from `first` on.
INLINE void multiply_of(const Work *work, int kind, int panels, const char *panel, long jump, long first, long rows, long begin,
                        long end) {
    long item = kind == FLOAT32 ? 4 : 2;
    if (rows <= DIRECT_ROWS) {
        float_tiles(work, kind, panels, panel + begin * item * PANEL, jump, first, rows, begin, end);
        return;
    }
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + BLOCK_INPUTS < end ? k + BLOCK_INPUTS : end;
        const char *block = panel + k * item * PANEL;
        if (kind != FLOAT32) {
            unpack(kind, panel, k, stop, work->block);
            block = (const char *)work->block;
        }
        float_tiles(work, FLOAT32, 1, block, 0, first, rows, k, stop);
    }
}

static void multiply(const Work *work, int panels, const char *panel, long jump, long first, long rows, long begin, long end) {
    switch (work->weight->kind) {
        case FLOAT32: multiply_of(work, FLOAT32, panels, panel, jump, first, rows, begin, end); break;
        case BFLOAT16: multiply_of(work, BFLOAT16, panels, panel, jump, first, rows, begin, end); break;
        case FLOAT16: multiply_of(work, FLOAT16, panels, panel, jump, first, rows, begin, end); break;
    }
}

INLINE vfloat load_few(const void *from, long index, int lanes, int dtype) {
    return lanes == LANES ? vf_load_as(from, index, dtype) : vf_load_some_as(from, index, lanes, dtype);
}

INLINE vfloat activated(vfloat value, int activation) {
    if (activation == GELU) return vf_gelu(value);
    if (activation == QUICK_GELU) return vf_mul(value, vf_sigmoid(vf_mul(value, vf_set1(1.702f))));
    return value;
}

// Writes one row of one panel. outputs: of the result. column: the panel's first one of these.
INLINE void finish_row(const Product *product, const float *sums, long row, long column, long outputs, int dtype) {
    int swiglu = product->weight->swiglu, vectors = swiglu ? PANEL_VECTORS / 2 : PANEL_VECTORS;
    for (int v = 0; v < vectors && column < outputs; v++, column += LANES) {
        int lanes = outputs - column < LANES ? (int)(outputs - column) : LANES;
        vfloat value = vf_load(sums + v * LANES);
        if (product->bias) value = vf_add(value, load_few(product->bias, column, lanes, FLOAT32));
        if (swiglu) {
            vfloat up = vf_load(sums + (vectors + v) * LANES);
            if (product->bias) up = vf_add(up, load_few(product->bias, outputs + column, lanes, FLOAT32));
            value = vf_mul(vf_mul(value, vf_sigmoid(value)), up);
        }
        value = activated(value, product->activation);
        long index = row * outputs + column;
        if (product->residual) value = vf_add(value, load_few(product->residual, index, lanes, dtype));
        if (lanes == LANES) vf_store_as(product->out, index, value, dtype);
        else vf_store_some_as(product->out, index, value, lanes, dtype);
    }
}

static void finish(const Product *product, const float *sums, long panel, long first, long rows) {
    int swiglu = product->weight->swiglu;
    long column = panel * (swiglu ? PANEL / 2 : PANEL), outputs = product->weight->outputs / (swiglu ? 2 : 1);
    for (long r = 0; r < rows; r++, sums += PANEL) {
        if (product->dtype == FLOAT32) finish_row(product, sums, first + r, column, outputs, FLOAT32);
        if (product->dtype == BFLOAT16) finish_row(product, sums, first + r, column, outputs, BFLOAT16);
        if (product->dtype == FLOAT16) finish_row(product, sums, first + r, column, outputs, FLOAT16);
    }
}

static void add_to_totals(float *totals, const float *sums, long rows) {
    for (long i = 0; i < rows * PANEL; i += LANES) vf_store(totals + i, vf_add(vf_load(totals + i), vf_load(sums + i)));
}

// Rows [first, first + rows) of one panel, or of two that lie `apart` panels from each other.
static void compute(const Work *work, long panel, long apart, long first, long rows) {
    const Product *product = work->product;
    const Weight *weight = work->weight;
    int panels = apart ? 2 : 1, shards = product->shards;
    long places = apart ? SUMS_JUMP / PANEL + rows : rows;
    const char *begin = weight->panels + (size_t)panel * weight->panel_size;
    for (int shard = 0; shard < shards; shard++) {
        long from = weight->inputs / shards * shard, to = shard + 1 < shards ? from + weight->inputs / shards : work->inputs;
        memset(work->sums, 0, (size_t)places * PANEL * sizeof(float));
        multiply(work, panels, begin, apart * (long)weight->panel_size, first, rows, from, to);
        if (shards == 1) break;
        if (shard == 0) memcpy(work->totals, work->sums, (size_t)places * PANEL * sizeof(float));
        else add_to_totals(work->totals, work->sums, places);
    }
    const float *totals = shards == 1 ? work->sums : work->totals;
    finish(product, totals, panel, first, rows);
    if (apart) finish(product, totals + SUMS_JUMP, panel + apart, first, rows);
}

void KERNEL(product_part)(const Product *product, int thread, int n_threads) {
    const Weight *weight = product->weight;
    char *own = product->scratch + activations_size(product) + (size_t)thread * (2 * SUMS_SIZE + BLOCK_SIZE);
    Work work = {.product = product, .weight = weight, .x = (const float *)product->scratch, .inputs = filled_inputs(weight),
                 .sums = (float *)own, .totals = (float *)(own + SUMS_SIZE), .block = (float *)(own + 2 * SUMS_SIZE)};
    pack_activations(product, (float *)product->scratch, thread, n_threads);
    mdi_barrier();
    long begin = weight->n_panels * thread / n_threads, end = weight->n_panels * (thread + 1) / n_threads;
    if (product->rows <= FEW_ROWS) {
        long half = (end - begin + 1) / 2;
        for (long panel = begin; panel < begin + half; panel++)
            compute(&work, panel, panel + half < end ? half : 0, 0, product->rows);
        return;
    }
    for (long first = 0; first < product->rows; first += ROWS_AT_ONCE) {
        long rows = product->rows - first < ROWS_AT_ONCE ? product->rows - first : ROWS_AT_ONCE;
        for (long panel = begin; panel < end; panel++) compute(&work, panel, 0, first, rows);
    }
}

static void run_part(void *product, int thread, int n_threads) { KERNEL(product_part)(product, thread, n_threads); }

int KERNEL(product)(const Weight *weight, const void *x, void *out, long rows, int dtype, const float *bias,
                    const void *residual, int activation, int shards) {
    Product product = {.weight = weight, .x = x, .out = out, .bias = bias, .residual = residual, .rows = rows,
                       .dtype = dtype, .activation = activation, .shards = shards};
    product.scratch = mdi_scratch(KERNEL(product_scratch)(&product, mdi_threads()));
    if (!product.scratch) return 1;
    mdi_parallel(run_part, &product);
    return 0;
}
