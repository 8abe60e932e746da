// Compares the kernels of an instruction set with the scalar ones, on small odd shapes. Run when the library is loaded.
#include <stdlib.h>

#include "attention.h"
#include "experts.h"
#include "norms.h"
#include "products.h"
#include "rotary.h"
#include "vector.h"
#include "vocabulary.h"

typedef Weight *Pack(long, long, int, int, int, int, const void *, const void *, const uint8_t *, const void *, const int32_t *,
                     int *);
Pack SCALAR(pack);
void SCALAR(discard)(Weight *);
int SCALAR(product)(const Weight *, const void *, void *, long, int, const float *, const void *, int, const Shards *, int64_t);
int SCALAR(mixture)(const Experts *, const void *, void *, const void *, long, int, const Shards *, int64_t);
int SCALAR(attention)(Attention *);
void SCALAR(rms_norm)(const Norm *);
void SCALAR(layer_norm)(const Norm *);
void SCALAR(rotate)(const Rotary *);
void SCALAR(peaks)(const Peaks *);
int64_t SCALAR(highest)(const float *, int64_t, int64_t, int64_t *);

enum { ROWS = 7, OUTPUTS = 70, INPUTS = 128 };
enum { PRODUCT_ROWS = 23, N_OUT = PRODUCT_ROWS * OUTPUTS };  // more than one tile has, and not all of the next one
enum { HEADS = 6, KV_HEADS = 2, HEAD_DIM = 40, SLOTS = 2, SLOT_ROWS = 530, CACHE = SLOTS * SLOT_ROWS * 2 * KV_HEADS };
enum { N_QUERIES = ROWS * HEADS * HEAD_DIM, N_HEADS = ROWS * (HEADS + 2 * KV_HEADS) * HEAD_DIM };
static const Run RUNS[] = {{0, 1, 526, 3}, {3, 0, 0, 4}};

// The same numbers in every run: in (-1, 1), of a dtype; for int8 any byte.
static void fill(void *numbers, long count, int dtype, uint32_t seed) {
    for (long i = 0; i < count; i++) {
        seed = seed * 1664525 + 1013904223;
        if (dtype == INT8) ((uint8_t *)numbers)[i] = (uint8_t)(seed >> 24);
        else store_as(numbers, i, (float)(int32_t)seed * 0x1p-31f, dtype);
    }
}

// Whether numbers are equal but for how they are rounded.
static int alike(const void *a, const void *b, long count, int dtype) {
    float tolerance = dtype == FLOAT32 ? 1e-4f : dtype == FLOAT16 ? 4e-3f : 3e-2f;
    for (long i = 0; i < count; i++) {
        float one = load_as(a, i, dtype), other = load_as(b, i, dtype);
        if (!(fabsf(one - other) <= tolerance * (1 + fabsf(other)))) return 0;
    }
    return 1;
}

typedef struct {
    int kind, group, group_scales, offsets, ordered, gate, activation;
} Kind;

// Whether both products are alike, and every row has the same bits alone.
static int product_passes(const Kind *kind, const Weight *ours, const Weight *theirs, int dtype) {
    float x[PRODUCT_ROWS * INPUTS], bias[OUTPUTS], residual[N_OUT], out[N_OUT], expected[N_OUT], alone[OUTPUTS];
    long width = kind->gate ? OUTPUTS / 2 : OUTPUTS, item = dtype_bytes(dtype);
    int activation = kind->activation;
    fill(x, PRODUCT_ROWS * INPUTS, dtype, 1);
    fill(bias, OUTPUTS, FLOAT32, 2);
    fill(residual, N_OUT, dtype, 3);
    if (KERNEL(product)(ours, x, out, PRODUCT_ROWS, dtype, bias, residual, activation, NULL, 0)) return 0;
    if (SCALAR(product)(theirs, x, expected, PRODUCT_ROWS, dtype, bias, residual, activation, NULL, 0)) return 0;
    for (long row = 0; row < PRODUCT_ROWS; row++) {
        const char *in = (const char *)x + row * INPUTS * item, *added = (const char *)residual + row * width * item;
        if (KERNEL(product)(ours, in, alone, 1, dtype, bias, added, activation, NULL, 0)) return 0;
        if (memcmp(alone, (const char *)out + row * width * item, (size_t)(width * item))) return 0;
    }
    return alike(out, expected, PRODUCT_ROWS * width, dtype);
}

static int weight_passes(const Kind *kind) {
    static float values[OUTPUTS * INPUTS];
    float scales[OUTPUTS * INPUTS / 32], minimums[OUTPUTS * INPUTS / 32];
    uint8_t zeros[OUTPUTS * INPUTS / 32];
    int32_t order[INPUTS];
    int quantized = kind->kind == INT8 || kind->kind == INT4, has_nan = 0, passes = 0;
    fill(values, OUTPUTS * INPUTS, quantized ? INT8 : kind->kind, 4);
    for (long i = 0; i < OUTPUTS * INPUTS / 32; i++) {
        float scale = (float)(1 + i % 5) * (kind->kind == INT8 ? 1e-3f : 2e-2f);
        store_as(scales, i, scale, kind->kind == INT4 ? FLOAT16 : FLOAT32);
        store_as(minimums, i, (float)(i % 7 - 4) * scale, kind->kind == INT4 ? FLOAT16 : FLOAT32);
        zeros[i] = (uint8_t)(i % 16);
    }
    for (int i = 0; i < INPUTS; i++) order[i] = INPUTS - 1 - i;
    const uint8_t *own_zeros = kind->offsets == ZEROS ? zeros : NULL;
    const float *own_minimums = kind->offsets == MINIMUMS ? minimums : NULL;
    const int32_t *places = kind->ordered ? order : NULL;
    Weight *ours = KERNEL(pack)(OUTPUTS, INPUTS, kind->kind, kind->group, kind->gate, kind->group_scales, values,
                                scales, own_zeros, own_minimums, places, &has_nan);
    Weight *theirs = SCALAR(pack)(OUTPUTS, INPUTS, kind->kind, kind->group, kind->gate, kind->group_scales, values,
                                  scales, own_zeros, own_minimums, places, &has_nan);
    if (ours && theirs)
        passes = product_passes(kind, ours, theirs, FLOAT32) && product_passes(kind, ours, theirs, BFLOAT16);
    if (ours) KERNEL(discard)(ours);
    if (theirs) SCALAR(discard)(theirs);
    return passes;
}

static int products_pass(void) {
    const Kind kinds[] = {
        {.kind = FLOAT32},
        {.kind = BFLOAT16, .gate = SILU},
        {.kind = FLOAT16, .activation = QUICK_GELU},
        {.kind = INT8, .group = 64, .activation = TANH_GELU},
        {.kind = INT8, .group = 64, .group_scales = 1, .activation = GELU},
        {.kind = INT8, .group = 32, .group_scales = 1},
        {.kind = INT4, .group = 32, .gate = TANH_GELU},
        {.kind = INT8, .group = 32, .group_scales = 1, .offsets = MINIMUMS},
        {.kind = INT4, .group = 32, .offsets = ZEROS},
        {.kind = INT4, .group = 32, .offsets = MINIMUMS},
        {.kind = INT4, .group = 32, .ordered = 1},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!weight_passes(&kinds[i])) return 0;
    return 1;
}

enum { EXPERTS = 5, PER_ROW = 2, INNER = 32 };

typedef struct {
    Weight *router, *gate_up[EXPERTS], *down[EXPERTS];
} Mixed;

// The same weights for any instruction set. Returns whether there is memory.
static int pack_experts(Mixed *mixed, Pack *pack) {
    static float values[2 * INNER * INPUTS];
    int has_nan, packed = 1;
    fill(values, EXPERTS * INPUTS, FLOAT32, 15);
    packed &= (mixed->router = pack(EXPERTS, INPUTS, FLOAT32, 0, 0, 0, values, NULL, NULL, NULL, NULL, &has_nan)) != NULL;
    for (uint32_t i = 0; i < EXPERTS; i++) {
        fill(values, 2 * INNER * INPUTS, FLOAT32, 16 + i);
        packed &= (mixed->gate_up[i] = pack(2 * INNER, INPUTS, FLOAT32, 0, 1, 0, values, NULL, NULL, NULL, NULL, &has_nan)) != NULL;
        packed &= (mixed->down[i] = pack(INPUTS, INNER, FLOAT32, 0, 0, 0, values, NULL, NULL, NULL, NULL, &has_nan)) != NULL;
    }
    return packed;
}

static void discard_experts(Mixed *mixed, void (*discard)(Weight *)) {
    if (mixed->router) discard(mixed->router);
    for (int i = 0; i < EXPERTS; i++) {
        if (mixed->gate_up[i]) discard(mixed->gate_up[i]);
        if (mixed->down[i]) discard(mixed->down[i]);
    }
}

static Experts experts_of(const Mixed *mixed) {
    return (Experts){.router = mixed->router, .gate_up = (const Weight *const *)mixed->gate_up,
                     .down = (const Weight *const *)mixed->down, .count = EXPERTS, .per_row = PER_ROW, .normalised = 1};
}

static int mixtures_pass(void) {
    float x[ROWS * INPUTS], out[ROWS * INPUTS], expected[ROWS * INPUTS];
    Mixed ours = {0}, theirs = {0};
    int packed = pack_experts(&ours, KERNEL(pack)) & pack_experts(&theirs, SCALAR(pack));
    Experts experts = experts_of(&ours), reference = experts_of(&theirs);
    fill(x, ROWS * INPUTS, FLOAT32, 30);
    int passes = packed && !KERNEL(mixture)(&experts, x, out, x, ROWS, FLOAT32, NULL, 0) &&
                 !SCALAR(mixture)(&reference, x, expected, x, ROWS, FLOAT32, NULL, 0) &&
                 alike(out, expected, ROWS * INPUTS, FLOAT32);
    discard_experts(&ours, KERNEL(discard));
    discard_experts(&theirs, SCALAR(discard));
    return passes;
}

static int attention_passes(int cache_dtype, float *cache, float *scales) {
    float queries[N_QUERIES], out[N_QUERIES], expected[N_QUERIES];
    long item = cache_dtype == INT8_CACHE ? 1 : dtype_bytes(cache_dtype);
    fill(queries, N_QUERIES, FLOAT32, 5);
    fill(cache, CACHE * HEAD_DIM, cache_dtype, 6);
    for (long i = 0; i < CACHE; i++) scales[i] = (float)(1 + i % 3) * 4e-3f;
    Attention call = {
        .queries = queries, .keys = cache, .values = (char *)cache + KV_HEADS * HEAD_DIM * item, .key_scales = scales,
        .value_scales = scales + KV_HEADS, .out = out, .runs = RUNS, .n_runs = 2, .query_stride = HEADS * HEAD_DIM,
        .key_stride = 2 * KV_HEADS * HEAD_DIM, .slot_rows = SLOT_ROWS, .heads = HEADS, .kv_heads = KV_HEADS,
        .head_dim = HEAD_DIM, .dtype = FLOAT32, .cache_dtype = cache_dtype, .causal = 1,
    };
    if (KERNEL(attention)(&call)) return 0;
    call.out = expected;
    return !SCALAR(attention)(&call) && alike(out, expected, N_QUERIES, FLOAT32);
}

static int attentions_pass(void) {
    float *cache = malloc(CACHE * HEAD_DIM * sizeof *cache), *scales = malloc(CACHE * sizeof *scales);
    int passes = cache && scales && attention_passes(FLOAT32, cache, scales) &&
                 attention_passes(BFLOAT16, cache, scales) && attention_passes(INT8_CACHE, cache, scales);
    free(cache);
    free(scales);
    return passes;
}

static int norms_pass(void) {
    float x[ROWS * INPUTS], weight[INPUTS], bias[INPUTS], out[ROWS * INPUTS], expected[ROWS * INPUTS];
    fill(weight, INPUTS, FLOAT32, 7);
    fill(bias, INPUTS, FLOAT32, 8);
    for (int dtype = FLOAT32; dtype <= FLOAT16; dtype++) {
        fill(x, ROWS * INPUTS, dtype, 9);
        Norm norm = {.x = x, .out = out, .weight = weight, .bias = bias, .rows = ROWS, .size = INPUTS - 5, .eps = 1e-6f,
                     .dtype = dtype};
        if (dtype == BFLOAT16) norm.residual = x;
        Norm reference = norm;
        reference.out = expected;
        KERNEL(rms_norm)(&norm);
        SCALAR(rms_norm)(&reference);
        if (!alike(out, expected, ROWS * norm.size, dtype)) return 0;
        KERNEL(layer_norm)(&norm);
        SCALAR(layer_norm)(&reference);
        if (!alike(out, expected, ROWS * norm.size, dtype)) return 0;
    }
    return 1;
}

static int rotations_pass(void) {
    float heads[N_HEADS], expected[N_HEADS], norm[HEAD_DIM];
    float cos[ROWS * HEAD_DIM / 2], sin[ROWS * HEAD_DIM / 2];
    fill(norm, HEAD_DIM, FLOAT32, 10);
    fill(cos, ROWS * HEAD_DIM / 2, FLOAT32, 11);
    fill(sin, ROWS * HEAD_DIM / 2, FLOAT32, 12);
    for (int dtype = FLOAT32; dtype <= FLOAT16; dtype++) {
        fill(heads, N_HEADS, dtype, 13);
        memcpy(expected, heads, sizeof heads);
        Rotary rotary = {.heads = heads, .cos = cos, .sin = sin, .q_norm = norm, .k_norm = norm, .runs = RUNS,
                         .n_runs = 2, .rows = ROWS, .n_heads = HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM,
                         .eps = 1e-6f, .dtype = dtype, .cache_dtype = dtype};
        KERNEL(rotate)(&rotary);
        rotary.heads = expected;
        SCALAR(rotate)(&rotary);
        if (!alike(heads, expected, N_HEADS, dtype)) return 0;
    }
    return 1;
}

static int vocabulary_passes(void) {
    enum { BLOCKS = 3, LOGITS = BLOCKS * BLOCK - 67, VOCABULARIES = 3, COUNT = 900 };  // not whole vectors
    static float logits[VOCABULARIES * LOGITS];
    const float scales[VOCABULARIES] = {1, 20, 0.1f};
    float highest[VOCABULARIES * BLOCKS], expected[VOCABULARIES * BLOCKS];
    double sums[VOCABULARIES * BLOCKS], reference[VOCABULARIES * BLOCKS];
    fill(logits, VOCABULARIES * LOGITS, FLOAT32, 14);
    Peaks peaks = {logits, scales, highest, sums, VOCABULARIES, LOGITS};
    KERNEL(peaks)(&peaks);
    peaks.highest = expected;
    peaks.sums = reference;
    SCALAR(peaks)(&peaks);
    for (int i = 0; i < VOCABULARIES * BLOCKS; i++)
        if (highest[i] != expected[i] || !(fabs(sums[i] - reference[i]) <= 1e-5 * reference[i])) return 0;
    int64_t ours[COUNT], theirs[COUNT];
    if (KERNEL(highest)(logits, LOGITS, COUNT, ours) != COUNT) return 0;
    return SCALAR(highest)(logits, LOGITS, COUNT, theirs) == COUNT && !memcmp(ours, theirs, sizeof ours);
}

// NULL, or the kernels that fail.
const char *KERNEL(self_test)(void) {
    if (!products_pass()) return "products";
    if (!mixtures_pass()) return "experts";
    if (!attentions_pass()) return "attention";
    if (!norms_pass()) return "norms";
    if (!rotations_pass()) return "rotation";
    if (!vocabulary_passes()) return "vocabulary";
    return NULL;
}
