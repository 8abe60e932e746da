// Attention of a packed batch over slots of keys and values, causal or full, with grouped heads (arXiv:2305.13245).
//
//   queries  [rows][heads][head_dim]                     a batch's sequences, one after the other
//   runs     [n_runs]                                    a sequence's rows: the first one, its slot and position
//
// A row's bits depend on its position and on the keys and values up to it, on nothing beside it. Keys are cut, from
// key 0 on, into partitions of 512, and these into blocks of 64:
//
//   a score is one sum over head_dim: LANES partial sums, added in a fixed order;
//   within a partition, blocks follow each other as in arXiv:2205.14135, in float32: the largest score so far, the sum
//   of the weights, and the weighted sum of the values, one accumulator a channel, keys in order;
//   a row's partitions are computed independently, and merged in their order.
//
// The query heads of one key head share what is read of the cache. An item of work is a key head and up to ITEM_ROWS
// rows (token by token, the heads of the group) of one sequence: with all partitions one after the other, or, where
// a sequence has few rows and a long context, with one partition, so that the context spreads over all threads.
#include "attention.h"

#include <math.h>

#include "memory.h"
#include "pool.h"
#include "vector.h"

enum { PARTITION = 512, BLOCK = 64, ITEM_ROWS = 96, SPREAD_TOKENS = 8 };
#if defined(MDI_SCALAR)
enum { QUERIES = 2, KEYS = 1, VECTORS = 1 };  // tiles: what lies in registers
#else
enum { QUERIES = 6, KEYS = 2, VECTORS = 2 };
#endif
#define UNROLL _Pragma("GCC unroll 6")  // sums stay in registers

typedef struct {  // the softmax of some rows over some keys: largest score, sum of weights, weighted sum of values
    float *largest, *sum, *mixed;  // [rows], [rows], [rows][width]
} Softmax;

typedef struct {  // where the next block of keys and values lies: fetched while this one is computed with
    const char *keys, *values;
    long stride, size;  // bytes from key to key; bytes of a key
} Ahead;

typedef struct {  // a thread's own memory
    float *queries, *keys, *values, *scores;  // [ITEM_ROWS][width], [BLOCK][width] twice, [ITEM_ROWS][BLOCK]
    float *key_scales, *value_scales;         // [BLOCK], of an int8 cache
    Softmax part, total;
    Ahead ahead;
} Scratch;

typedef struct {  // some tokens of a run, all heads of one key head's group, over partitions [first, last)
    const Run *run;
    long token, tokens, head, first_partition, last_partition;
    float *partials;  // of a spread run: [tokens][heads][partitions][width + 2], else NULL
} Item;

typedef struct {
    const Attention *call;
    long group, width, item_tokens;  // query heads of a key head; head_dim in whole vectors; tokens of an item
    float scale;
    float *partials;  // of spread runs
} Work;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long pieces(long length, long size) { return (length + size - 1) / size; }

// Keys that a run's last row attends to.
INLINE long keys_of(const Attention *call, const Run *run) {
    return call->causal ? run->start + run->length : call->slot_rows;
}
INLINE long partitions_of(const Attention *call, const Run *run) { return pieces(keys_of(call, run), PARTITION); }
INLINE int spreads(const Attention *call, const Run *run) {
    return run->length <= SPREAD_TOKENS && partitions_of(call, run) > 1;
}
INLINE long partials_of(const Work *work, const Run *run) {
    return run->length * work->call->heads * partitions_of(work->call, run) * (work->width + 2);
}

// [rows][from_stride] of a dtype, from index `first` on, to float32 [rows][width], times a factor, zeros behind head_dim.
static void widen(const void *from, long first, long from_stride, int dtype, long rows, long head_dim, long width, float factor,
                  float *to) {
    vfloat by = vf_set1(factor);
    for (long row = 0; row < rows; row++, to += width) {
        long d = 0, at = first + row * from_stride;
        if (dtype == FLOAT32)
            for (; d + LANES <= head_dim; d += LANES) vf_store(to + d, vf_mul(by, vf_load_as(from, at + d, FLOAT32)));
        else if (dtype == BFLOAT16)
            for (; d + LANES <= head_dim; d += LANES) vf_store(to + d, vf_mul(by, vf_load_as(from, at + d, BFLOAT16)));
        else if (dtype == FLOAT16)
            for (; d + LANES <= head_dim; d += LANES) vf_store(to + d, vf_mul(by, vf_load_as(from, at + d, FLOAT16)));
        else
            for (; d < head_dim; d++) to[d] = (float)((const int8_t *)from)[at + d];
        for (; d < width; d++) to[d] = d < head_dim ? load_as(from, at + d, dtype) * factor : 0.0f;
    }
}

INLINE void score_tile(const float *queries, const float *keys, long width, float *scores, int n_queries, int n_keys) {
    vfloat sums[QUERIES][KEYS];
    UNROLL for (int q = 0; q < n_queries; q++)
        UNROLL for (int k = 0; k < n_keys; k++) sums[q][k] = vf_zero();
    for (long d = 0; d < width; d += LANES) {
        vfloat key[KEYS];
        UNROLL for (int k = 0; k < n_keys; k++) key[k] = vf_load(keys + k * width + d);
        UNROLL for (int q = 0; q < n_queries; q++) {
            vfloat query = vf_load(queries + q * width + d);
            UNROLL for (int k = 0; k < n_keys; k++) sums[q][k] = vf_fma(query, key[k], sums[q][k]);
        }
    }
    UNROLL for (int q = 0; q < n_queries; q++)
        UNROLL for (int k = 0; k < n_keys; k++) scores[q * BLOCK + k] = vf_sum(sums[q][k]);
}

// The processor itself does not foresee short pieces with gaps between them. Keys are fetched while scores are computed,
// values while values are mixed.
INLINE void fetch(const char *from, const Ahead *ahead, long key, long end) {
    for (; key < end; key++)
        for (long at = 0; at < ahead->size; at += 64) __builtin_prefetch(from + key * ahead->stride + at);
}

INLINE void score_strip(const float *queries, const float *keys, const Ahead *ahead, long width, long n_keys,
                        float *scores, int n_queries) {
    long key = 0;
    for (; key + KEYS <= n_keys; key += KEYS) {
        if (ahead) fetch(ahead->keys, ahead, key, key + KEYS);
        score_tile(queries, keys + key * width, width, scores + key, n_queries, KEYS);
    }
    for (; key < n_keys; key++) score_tile(queries, keys + key * width, width, scores + key, n_queries, 1);
}

// mixed = mixed * kept + weights x values, for VECTORS vectors of channels.
INLINE void value_tile(const float *weights, const float *values, long width, long n_keys, const float *kept,
                       float *mixed, int n_queries, int n_vectors) {
    vfloat sums[QUERIES][VECTORS];
    UNROLL for (int q = 0; q < n_queries; q++)
        UNROLL for (int v = 0; v < n_vectors; v++)
            sums[q][v] = vf_mul(vf_load(mixed + q * width + v * LANES), vf_set1(kept[q]));
    for (long key = 0; key < n_keys; key++, values += width) {
        vfloat value[VECTORS];
        UNROLL for (int v = 0; v < n_vectors; v++) value[v] = vf_load(values + v * LANES);
        UNROLL for (int q = 0; q < n_queries; q++) {
            vfloat weight = vf_set1(weights[q * BLOCK + key]);
            UNROLL for (int v = 0; v < n_vectors; v++) sums[q][v] = vf_fma(weight, value[v], sums[q][v]);
        }
    }
    UNROLL for (int q = 0; q < n_queries; q++)
        UNROLL for (int v = 0; v < n_vectors; v++) vf_store(mixed + q * width + v * LANES, sums[q][v]);
}

INLINE void value_strip(const float *weights, const float *values, const Ahead *ahead, long width, long n_keys,
                        const float *kept, float *mixed, int n_queries) {
    long d = 0;
    for (; d + VECTORS * LANES <= width; d += VECTORS * LANES) {
        if (ahead) fetch(ahead->values, ahead, d * BLOCK / width, (d + VECTORS * LANES) * BLOCK / width);
        value_tile(weights, values + d, width, n_keys, kept, mixed + d, n_queries, VECTORS);
    }
    for (; d < width; d += LANES)
        value_tile(weights, values + d, width, n_keys, kept, mixed + d, n_queries, 1);
}

// One row's scores become weights: exp(score - largest), zeros behind. Returns what earlier sums are multiplied by.
static float weigh(Scratch *scratch, const float *key_scales, const float *value_scales, long row, long n_keys) {
    Softmax *part = &scratch->part;
    float *scores = scratch->scores + row * BLOCK;
    long end = pieces(n_keys, LANES) * LANES;
    if (key_scales)
        for (long key = 0; key < n_keys; key++) scores[key] *= key_scales[key];
    for (long key = n_keys; key < end; key++) scores[key] = -INFINITY;
    vfloat largest = vf_set1(part->largest[row]), sum = vf_zero();
    for (long key = 0; key < end; key += LANES) largest = vf_max(vf_load(scores + key), largest);
    float highest = vf_largest(largest), before[LANES];
    vf_store(before, vf_exp(vf_set1(part->largest[row] - highest)));
    for (long key = 0; key < end; key += LANES) {
        vfloat weight = vf_exp(vf_sub(vf_load(scores + key), vf_set1(highest)));
        sum = vf_add(sum, weight);
        vf_store(scores + key, weight);
    }
    if (value_scales)
        for (long key = 0; key < n_keys; key++) scores[key] *= value_scales[key];
    part->largest[row] = highest;
    part->sum[row] = part->sum[row] * before[0] + vf_sum(sum);
    return before[0];
}

INLINE void attend_strip(Scratch *scratch, const float *key_scales, const float *value_scales, long row, long n_keys,
                         long width, int n_queries) {
    float *scores = scratch->scores + row * BLOCK, kept[QUERIES];
    const Ahead *ahead = row == 0 && scratch->ahead.keys ? &scratch->ahead : NULL;
    score_strip(scratch->queries + row * width, scratch->keys, ahead, width, n_keys, scores, n_queries);
    for (int q = 0; q < n_queries; q++) kept[q] = weigh(scratch, key_scales, value_scales, row + q, n_keys);
    value_strip(scores, scratch->values, ahead, width, n_keys, kept, scratch->part.mixed + row * width, n_queries);
}

// Rows [row, end) attend to the first n_keys keys of the block.
static void attend_rows(Scratch *scratch, int quantized, long row, long end, long n_keys, long width) {
    const float *ks = quantized ? scratch->key_scales : NULL, *vs = quantized ? scratch->value_scales : NULL;
    for (; row + QUERIES <= end; row += QUERIES) attend_strip(scratch, ks, vs, row, n_keys, width, QUERIES);
    if (QUERIES > 4 && end - row >= 4) attend_strip(scratch, ks, vs, row, n_keys, width, 4), row += 4;
    if (QUERIES > 2 && end - row >= 2) attend_strip(scratch, ks, vs, row, n_keys, width, 2), row += 2;
    if (end - row >= 1) attend_strip(scratch, ks, vs, row, n_keys, width, 1);
}

// ahead: whether a whole block of these keys follows.
static void load_block(const Work *work, Scratch *scratch, long slot, long first, long n_keys, long head, int ahead) {
    const Attention *call = work->call;
    long item = call->cache_dtype == INT8_CACHE ? 1 : dtype_bytes(call->cache_dtype);
    long row = slot * call->slot_rows + first, at = row * call->key_stride + head * call->head_dim;
    widen(call->keys, at, call->key_stride, call->cache_dtype, n_keys, call->head_dim, work->width, 1.0f, scratch->keys);
    widen(call->values, at, call->key_stride, call->cache_dtype, n_keys, call->head_dim, work->width, 1.0f,
          scratch->values);
    long next = (at + BLOCK * call->key_stride) * item;
    scratch->ahead = (Ahead){ahead ? (const char *)call->keys + next : NULL, (const char *)call->values + next,
                             call->key_stride * item, call->head_dim * item};
    if (call->cache_dtype != INT8_CACHE) return;
    for (long key = 0; key < n_keys; key++) {
        scratch->key_scales[key] = call->key_scales[(row + key) * 2 * call->kv_heads + head];
        scratch->value_scales[key] = call->value_scales[(row + key) * 2 * call->kv_heads + head];
    }
}

static void begin(Softmax *softmax, long rows, long width) {
    for (long row = 0; row < rows; row++) softmax->largest[row] = -INFINITY, softmax->sum[row] = 0.0f;
    memset(softmax->mixed, 0, sizeof(float) * rows * width);
}

// The first keys_of(token) keys of a slot are what a token of a run attends to.
INLINE long keys_of_token(const Attention *call, const Run *run, long token) {
    return call->causal ? run->start + token + 1 : call->slot_rows;
}

// An item's rows over one partition: into scratch->part.
static void attend_partition(const Work *work, Scratch *scratch, const Item *item, long partition) {
    const Attention *call = work->call;
    long group = work->group, width = work->width, quantized = call->cache_dtype == INT8_CACHE;
    long last = keys_of_token(call, item->run, item->token + item->tokens - 1);
    begin(&scratch->part, item->tokens * group, width);
    for (long block = partition * PARTITION; block < least((partition + 1) * PARTITION, last); block += BLOCK) {
        long n_keys = least(BLOCK, last - block), token = 0;
        load_block(work, scratch, item->run->slot, block, n_keys, item->head, block + 2 * BLOCK <= last);
        for (long seen; token < item->tokens; token++) {  // the tokens that see no key of the block, or not all
            seen = keys_of_token(call, item->run, item->token + token) - block;
            if (seen >= n_keys) break;
            if (seen > 0) attend_rows(scratch, quantized, token * group, (token + 1) * group, seen, width);
        }
        attend_rows(scratch, quantized, token * group, item->tokens * group, n_keys, width);
    }
}

// Adds what a row's next partition gave to what its earlier ones did.
static void merge(float *largest, float *sum, float *mixed, float part_largest, float part_sum, const float *part_mixed,
                  long width) {
    float highest = part_largest > *largest ? part_largest : *largest;
    vfloat kept = vf_exp(vf_set1(*largest - highest)), added = vf_exp(vf_set1(part_largest - highest));
    for (long d = 0; d < width; d += LANES)
        vf_store(mixed + d, vf_fma(vf_load(part_mixed + d), added, vf_mul(vf_load(mixed + d), kept)));
    float sums[LANES];
    vf_store(sums, vf_fma(vf_set1(part_sum), added, vf_mul(vf_set1(*sum), kept)));
    *largest = highest;
    *sum = sums[0];
}

static void write_row(const Work *work, long row, long head, float sum, const float *mixed) {
    const Attention *call = work->call;
    long at = (row * call->heads + head) * call->head_dim, d = 0;
    vfloat by = vf_set1(sum);
    for (; d + LANES <= call->head_dim; d += LANES)
        vf_store_as(call->out, at + d, vf_div(vf_load(mixed + d), by), call->dtype);
    for (; d < call->head_dim; d++) store_as(call->out, at + d, mixed[d] / sum, call->dtype);
}

static void keep_partials(const Work *work, const Scratch *scratch, const Item *item) {
    long group = work->group, size = work->width + 2, partitions = partitions_of(work->call, item->run);
    for (long row = 0; row < item->tokens * group; row++) {
        long token = item->token + row / group, head = item->head * group + row % group;
        float *to = item->partials + ((token * work->call->heads + head) * partitions + item->first_partition) * size;
        to[0] = scratch->part.largest[row], to[1] = scratch->part.sum[row];
        memcpy(to + 2, scratch->part.mixed + row * work->width, sizeof(float) * work->width);
    }
}

static void attend_item(const Work *work, Scratch *scratch, const Item *item) {
    const Attention *call = work->call;
    long group = work->group, width = work->width, rows = item->tokens * group;
    for (long token = 0; token < item->tokens; token++) {
        long at = (item->run->row + item->token + token) * call->query_stride + item->head * group * call->head_dim;
        widen(call->queries, at, call->head_dim, call->dtype, group, call->head_dim, width, work->scale,
              scratch->queries + token * group * width);
    }
    begin(&scratch->total, rows, width);
    for (long partition = item->first_partition; partition < item->last_partition; partition++) {
        attend_partition(work, scratch, item, partition);
        if (item->partials) keep_partials(work, scratch, item);
        for (long row = 0; row < rows && !item->partials; row++)
            if (keys_of_token(call, item->run, item->token + row / group) > partition * PARTITION)
                merge(&scratch->total.largest[row], &scratch->total.sum[row], scratch->total.mixed + row * width,
                      scratch->part.largest[row], scratch->part.sum[row], scratch->part.mixed + row * width, width);
    }
    for (long row = 0; row < rows && !item->partials; row++)
        write_row(work, item->run->row + item->token + row / group, item->head * group + row % group,
                  scratch->total.sum[row], scratch->total.mixed + row * width);
}

// The tokens of a run that have an item of their own for each partition: merges these.
static void merge_run(const Work *work, Scratch *scratch, const Run *run, const float *partials, long token) {
    long size = work->width + 2, partitions = partitions_of(work->call, run), heads = work->call->heads;
    for (long head = 0; head < heads; head++) {
        const float *part = partials + (token * heads + head) * partitions * size;
        begin(&scratch->total, 1, work->width);
        for (long partition = 0; partition * PARTITION < keys_of_token(work->call, run, token); partition++, part += size)
            merge(scratch->total.largest, scratch->total.sum, scratch->total.mixed, part[0], part[1], part + 2,
                  work->width);
        write_row(work, run->row + token, head, scratch->total.sum[0], scratch->total.mixed);
    }
}

static long item_rows(const Work *work) { return ITEM_ROWS > work->group ? ITEM_ROWS : work->group; }

static size_t thread_size(const Work *work) {
    long rows = item_rows(work), width = work->width;
    size_t floats = 3 * rows * width + 2 * BLOCK * width + rows * BLOCK + 2 * BLOCK + 4 * rows;
    return (floats * sizeof(float) + 63) & ~(size_t)63;
}

static Scratch scratch_of(const Work *work, int thread) {
    long rows = item_rows(work), width = work->width;
    Scratch scratch;
    float *at = scratch.queries = (float *)(work->call->scratch + thread * thread_size(work));
    scratch.keys = at += rows * width;
    scratch.values = at += BLOCK * width;
    scratch.part.mixed = at += BLOCK * width;
    scratch.total.mixed = at += rows * width;
    scratch.scores = at += rows * width;
    scratch.key_scales = at += rows * BLOCK;
    scratch.value_scales = at += BLOCK;
    scratch.part.largest = at += BLOCK;
    scratch.part.sum = at += rows;
    scratch.total.largest = at += rows;
    scratch.total.sum = at += rows;
    return scratch;
}

// Goes through all items, in the same order on every thread, and does those that it claims.
static void attend_claimed(const Work *work, Scratch *scratch) {
    const Attention *call = work->call;
    long index = 0, mine = atomic_fetch_add(call->claimed, 1);
    float *partials = work->partials;
    for (const Run *run = call->runs; run < call->runs + call->n_runs; run++) {
        int spread = spreads(call, run);
        for (long token = 0; token < run->length; token += work->item_tokens) {
            long tokens = least(work->item_tokens, run->length - token);
            long end = pieces(keys_of_token(call, run, token + tokens - 1), PARTITION);
            for (long first = 0; first < end; first += spread ? 1 : end)
                for (long head = 0; head < call->kv_heads; head++) {
                    if (index++ != mine) continue;
                    Item item = {run, token, tokens, head, first, spread ? first + 1 : end, spread ? partials : NULL};
                    attend_item(work, scratch, &item);
                    mine = atomic_fetch_add(call->claimed, 1);
                }
        }
        if (spread) partials += partials_of(work, run);
    }
}

static Work work_of(const Attention *call, int n_threads) {
    Work work = {.call = call, .group = call->heads / call->kv_heads, .width = pieces(call->head_dim, LANES) * LANES};
    work.item_tokens = work.group < ITEM_ROWS ? ITEM_ROWS / work.group : 1;
    work.scale = 1.0f / sqrtf((float)call->head_dim);
    if (call->scratch) work.partials = (float *)(call->scratch + n_threads * thread_size(&work));
    return work;
}

size_t KERNEL(attention_scratch)(const Attention *call, int n_threads) {
    Work work = work_of(call, n_threads);
    size_t partials = 0;
    for (const Run *run = call->runs; run < call->runs + call->n_runs; run++)
        if (spreads(call, run)) partials += partials_of(&work, run);
    return n_threads * thread_size(&work) + partials * sizeof(float);
}

void KERNEL(attention_part)(const Attention *call, int thread, int n_threads) {
    Work work = work_of(call, n_threads);
    Scratch scratch = scratch_of(&work, thread);
    attend_claimed(&work, &scratch);
    long index = 0;
    const float *partials = work.partials;
    for (const Run *run = call->runs; run < call->runs + call->n_runs; run++) {
        if (!spreads(call, run)) continue;
        if (partials == work.partials) mdi_barrier();
        for (long token = 0; token < run->length; token++)
            if (index++ % n_threads == thread) merge_run(&work, &scratch, run, partials, token);
        partials += partials_of(&work, run);
    }
}

static void run_attention(void *call, int thread, int n_threads) { KERNEL(attention_part)(call, thread, n_threads); }

int KERNEL(attention)(Attention *call) {
    atomic_long claimed = 0;
    call->claimed = &claimed;
    call->scratch = mdi_scratch(KERNEL(attention_scratch)(call, mdi_threads()));
    if (!call->scratch) return 1;
    mdi_parallel(run_attention, call);
    return 0;
}
