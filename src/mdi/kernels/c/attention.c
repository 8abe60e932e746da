// Attention of a packed batch over slots of keys and values, causal or full, with grouped heads (arXiv:2305.13245).
//
//   queries  [rows][heads][head_dim]                     a batch's sequences, one after the other
//   runs     [n_runs]                                    a sequence's rows: the first one, its slot and position
//
// A row's bits depend on its position and on the keys and values up to it, on nothing beside it. Keys are cut, from
// key 0 on, into partitions of 512, and these into blocks of 64:
//
//   a score is one accumulator over head_dim, channels in order;
//   within a partition, blocks follow each other as in arXiv:2205.14135, in float32: the largest score so far, the sum
//   of the weights, and the weighted sum of the values, one accumulator a channel, keys in order;
//   a row's partitions are computed independently, and merged in their order.
//
// An item of work is some rows of one sequence, at most ITEM_ROWS: the query heads of one key head, which share what is
// read of the cache, token by token; of few tokens all key heads, as memory is read fastest in one piece. It has all
// partitions, or, where a sequence has few rows and a long context, some, so that the context spreads over all threads.
#include "attention.h"

#include <float.h>
#include <math.h>

#include "attention_tiles.h"
#include "floats.h"
#include "memory.h"
#include "pool.h"

enum { PARTITION = 512, ITEM_ROWS = 192, SPREAD_TOKENS = 8, ITEMS_PER_THREAD = 2, CACHE_LINE = 64 };

typedef struct {  // the softmax of some rows over some keys: largest score, sum of weights, weighted sum of values
    float *largest, *sum, *mixed;  // [rows], [rows], [rows][width]
} Softmax;

typedef struct {  // a thread's own memory
    float *panel;                      // of keys or values
    float *queries, *scores;           // [rows][width], [rows][BLOCK]
    float *key_scales, *value_scales;  // [BLOCK], of an int8 cache
    float *highest, *kept;             // [rows]: the largest score so far; what earlier sums are multiplied by
    int *unseen, *seen;                // [rows]: a row attends to the keys [unseen, seen) of the block
    Softmax part, total;
    Ahead ahead;
} Scratch;

typedef struct {  // how a run is cut into items
    long tokens, heads, partitions;  // of an item; heads are key heads
    int spreads;                     // an item has some of the partitions
} Cut;

typedef struct {  // tokens of a run, with some key heads' groups, over partitions [first, last)
    const Run *run;
    long token, tokens, head, heads, first_partition, last_partition;
    float *partials;  // of a spread run: [tokens][heads][partitions][width + 2], else NULL
} Item;

typedef struct {
    const Attention *call;
    long group, width;  // query heads of a key head; head_dim in whole vectors
    int n_threads, heads_together;
    float scale;
    float *partials;  // of spread runs
} Work;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long pieces(long length, long size) { return (length + size - 1) / size; }
INLINE long number_bytes(int dtype) { return dtype == INT8_CACHE ? 1 : dtype_bytes(dtype); }

// A token of a run attends to the keys [first_key(token), keys_of_token(token)) of its slot.
INLINE long keys_of_token(const Attention *call, const Run *run, long token) {
    return call->causal ? run->start + token + 1 : call->slot_rows;
}
INLINE long first_key(const Attention *call, const Run *run, long token) {
    return call->window ? most(0, keys_of_token(call, run, token) - call->window) : 0;
}
INLINE long partitions_of(const Attention *call, const Run *run) {
    return pieces(keys_of_token(call, run, run->length - 1), PARTITION);
}
INLINE int spreads(const Attention *call, const Run *run) {
    return run->length <= SPREAD_TOKENS && partitions_of(call, run) > 1;
}
INLINE int has_few_rows(const Attention *call, const Run *run) { return run->length * call->heads <= ITEM_ROWS; }
INLINE long partials_of(const Work *work, const Run *run) {
    return run->length * work->call->heads * partitions_of(work->call, run) * (work->width + 2);
}

static Cut cut_of(const Work *work, const Run *run) {
    const Attention *call = work->call;
    int together = work->heads_together && has_few_rows(call, run), spread = spreads(call, run);
    long heads = together ? call->kv_heads : 1, partitions = partitions_of(call, run);
    long share = ITEMS_PER_THREAD * work->n_threads;  // of the run's tokens, or of its partitions
    if (spread) partitions = most(1, partitions / share);
    long tokens = spread ? run->length : pieces(run->length * call->kv_heads, share * heads);
    return (Cut){most(1, least(tokens, ITEM_ROWS / (work->group * heads))), heads, partitions, spread};
}

// A token's queries of one key head: [group][width] of float32, times a factor.
static void widen_queries(const Work *work, long at, float *to) {
    const Attention *call = work->call;
    for (long head = 0; head < work->group; head++, at += call->head_dim, to += work->width) {
        widen_row(call->queries, at, call->dtype, call->head_dim, to);
        for (long d = 0; d < work->width; d += LANES) vf_store(to + d, vf_mul(vf_load(to + d), vf_set1(work->scale)));
    }
}

// While a block is computed, the rows of the cache behind it are fetched, if the item has all of their heads.
static Ahead ahead_of(const Work *work, const Scratch *scratch, const Item *item, long next) {
    const Attention *call = work->call;
    if (item->heads < call->kv_heads) return (Ahead){(const char *)scratch->panel, 0};
    long bytes = number_bytes(call->cache_dtype), row = item->run->slot * call->slot_rows + next;
    return (Ahead){(const char *)call->keys + row * call->key_stride * bytes, PANEL * bytes};
}

static void score_block(const Work *work, Scratch *scratch, const Rows *keys, const float *queries, float *scores,
                        long rows) {
    for (long key = 0; key < keys->n_keys; key += PANEL) {
        pack_keys(keys, key, scratch->panel);
        score_rows(queries, work->width, scratch->panel, keys->head_dim, rows, scores + key,
                   rows <= TILE_ROWS ? &scratch->ahead : NULL);
    }
}

// The keys that a row does not see have a score of -infinity. Returns the largest score.
static float mask_scores(float *scores, const float *key_scales, long unseen, long n_keys, float largest) {
    vfloat highest = vf_set1(largest);
    if (key_scales)
        for (long key = 0; key < n_keys; key += LANES)
            vf_store(scores + key, vf_mul(vf_load(scores + key), vf_load(key_scales + key)));
    for (long key = 0; key < unseen; key++) scores[key] = -INFINITY;
    for (long key = n_keys; key % LANES; key++) scores[key] = -INFINITY;
    for (long key = 0; key < n_keys; key += LANES) highest = vf_max(vf_load(scores + key), highest);
    return vf_largest(highest);
}

// Scores become weights, 2^(score - highest), zeros behind those of the row. Returns their sum.
static float weigh_scores(float *scores, const float *value_scales, long n_keys, float highest) {
    vfloat sum = vf_zero();
    for (long key = 0; key < n_keys; key += LANES) {
        vfloat weight = vf_exp2(vf_sub(vf_load(scores + key), vf_set1(highest)));
        sum = vf_add(sum, weight);
        vf_store(scores + key, value_scales ? vf_mul(weight, vf_load(value_scales + key)) : weight);
    }
    return vf_sum(sum);
}

static void weigh_block(Scratch *scratch, int quantized, float *largest, float *sum, long first, long rows) {
    const float *key_scales = quantized ? scratch->key_scales : NULL;
    const float *value_scales = quantized ? scratch->value_scales : NULL;
    float *highest = scratch->highest, *kept = scratch->kept;
    for (long row = first; row < rows; row++)
        highest[row] = mask_scores(scratch->scores + row * BLOCK, key_scales, scratch->unseen[row], scratch->seen[row],
                                   largest[row]);
    for (long row = first; row < rows; row += LANES)
        vf_store(kept + row, vf_exp2(vf_sub(vf_load(largest + row), vf_load(highest + row))));
    for (long row = first; row < rows; row++) {
        float added = weigh_scores(scratch->scores + row * BLOCK, value_scales, scratch->seen[row], highest[row]);
        sum[row] = sum[row] * kept[row] + added;
        largest[row] = highest[row];
    }
}

// Values are read in place where they are read once: by few rows, in whole panels.
static void mix_block(const Work *work, Scratch *scratch, const Rows *values, float *mixed, long first, long rows) {
    int in_place = rows - first <= TILE_ROWS && values->head_dim % PANEL == 0;
    Rows panel = {scratch->panel, 0, PANEL, values->n_keys, PANEL, FLOAT32}, some = *values;
    Mix mix = {scratch->scores + first * BLOCK, scratch->kept + first, scratch->seen + first,
               mixed + first * work->width, work->width, rows - first};
    for (long d = 0; d < work->width; d += PANEL, some.at += PANEL, mix.mixed += PANEL) {
        if (in_place) {
            mix_in_place(mix, &some, &scratch->ahead);
        } else {
            pack_values(values, d, scratch->panel);
            mix_panel(mix, panel, (work->width - d) / LANES);
        }
    }
}

static void load_scales(const Attention *call, Scratch *scratch, long row, long head, long n_keys) {
    long at = row * 2 * call->kv_heads + head;
    for (long key = 0; key < BLOCK; key++, at += 2 * call->kv_heads) {
        scratch->key_scales[key] = key < n_keys ? call->key_scales[at] : 0.0f;
        scratch->value_scales[key] = key < n_keys ? call->value_scales[at] : 0.0f;
    }
}

// A key head's rows over one block of its keys, from the one at `cached` in the cache on; rows before `first` see none.
static void attend_head(const Work *work, Scratch *scratch, long head, long cached, long n_keys, float *queries,
                        const Softmax *part, long first, long rows) {
    const Attention *call = work->call;
    int quantized = call->cache_dtype == INT8_CACHE;
    long at = cached * call->key_stride + head * call->head_dim;
    Rows keys = {call->keys, at, call->key_stride, n_keys, call->head_dim, call->cache_dtype};
    Rows values = keys;
    values.numbers = call->values;
    if (quantized) load_scales(call, scratch, cached, head, n_keys);
    score_block(work, scratch, &keys, queries + first * work->width, scratch->scores + first * BLOCK, rows - first);
    weigh_block(scratch, quantized, part->largest, part->sum, first, rows);
    mix_block(work, scratch, &values, part->mixed, first, rows);
}

// An item's rows over a block of keys. last: the end of the item's keys.
static void attend_block(const Work *work, Scratch *scratch, const Item *item, long block, long last) {
    const Attention *call = work->call;
    long group = work->group, rows = item->tokens * group, first = rows, n_keys = least(BLOCK, last - block);
    for (long token = item->tokens - 1; token >= 0; token--, first -= group) {
        long seen = keys_of_token(call, item->run, item->token + token) - block;
        if (seen <= 0) break;
        long unseen = first_key(call, item->run, item->token + token) - block;
        for (long row = token * group; row < (token + 1) * group; row++) {
            scratch->unseen[row] = (int)most(0, least(unseen, n_keys));
            scratch->seen[row] = (int)least(seen, n_keys);
        }
    }
    scratch->ahead = ahead_of(work, scratch, item, least(block + BLOCK, last));
    for (long head = 0; head < item->heads; head++) {
        Softmax part = {scratch->part.largest + head * rows, scratch->part.sum + head * rows,
                        scratch->part.mixed + head * rows * work->width};
        attend_head(work, scratch, item->head + head, item->run->slot * call->slot_rows + block, n_keys,
                    scratch->queries + head * rows * work->width, &part, first, rows);
    }
}

// The largest score is finite at first: the difference of two infinite ones, of a row that sees no key, is none.
static void begin(Softmax *softmax, long rows, long width) {
    for (long row = 0; row < rows; row++) softmax->largest[row] = -FLT_MAX, softmax->sum[row] = 0.0f;
    memset(softmax->mixed, 0, sizeof(float) * rows * width);
}

// An item's rows over one partition: into scratch->part. Blocks before the window of the first token are left out; to
// later tokens they would add nothing, not even a bit: what is added before the first seen key is multiplied by 2^-126.
static void attend_partition(const Work *work, Scratch *scratch, const Item *item, long partition, long last) {
    begin(&scratch->part, item->heads * item->tokens * work->group, work->width);
    long first = most(partition * PARTITION, first_key(work->call, item->run, item->token) / BLOCK * BLOCK);
    for (long block = first; block < least((partition + 1) * PARTITION, last); block += BLOCK)
        attend_block(work, scratch, item, block, last);
}

// Adds what a row's next partition gave to what its earlier ones did.
static void merge(float *largest, float *sum, float *mixed, float part_largest, float part_sum, const float *part_mixed,
                  long width) {
    float highest = part_largest > *largest ? part_largest : *largest;
    vfloat kept = vf_exp2(vf_set1(*largest - highest)), added = vf_exp2(vf_set1(part_largest - highest));
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

// The token of an item's row, counted from the run's first one, and its query head.
INLINE long token_of(const Work *work, const Item *item, long row) {
    return item->token + row / work->group % item->tokens;
}
INLINE long head_of(const Work *work, const Item *item, long row) {
    return (item->head + row / (item->tokens * work->group)) * work->group + row % work->group;
}

static void keep_partials(const Work *work, const Softmax *part, const Item *item, long rows, long partition) {
    long size = work->width + 2, partitions = partitions_of(work->call, item->run);
    for (long row = 0; row < rows; row++) {
        long at = token_of(work, item, row) * work->call->heads + head_of(work, item, row);
        float *to = item->partials + (at * partitions + partition) * size;
        to[0] = part->largest[row], to[1] = part->sum[row];
        memcpy(to + 2, part->mixed + row * work->width, sizeof(float) * work->width);
    }
}

static void merge_partition(const Work *work, Scratch *scratch, const Item *item, long rows, long partition) {
    Softmax *part = &scratch->part, *total = &scratch->total;
    for (long row = 0; row < rows; row++)
        if (keys_of_token(work->call, item->run, token_of(work, item, row)) > partition * PARTITION)
            merge(&total->largest[row], &total->sum[row], total->mixed + row * work->width, part->largest[row],
                  part->sum[row], part->mixed + row * work->width, work->width);
}

static void attend_item(const Work *work, Scratch *scratch, const Item *item) {
    const Attention *call = work->call;
    long width = work->width, rows = item->heads * item->tokens * work->group;
    for (long row = 0; row < rows; row += work->group) {
        long at = (item->run->row + token_of(work, item, row)) * call->query_stride;
        widen_queries(work, at + head_of(work, item, row) * call->head_dim, scratch->queries + row * width);
    }
    begin(&scratch->total, rows, width);
    long last = least(item->last_partition * PARTITION, keys_of_token(call, item->run, item->token + item->tokens - 1));
    for (long partition = item->first_partition; partition < item->last_partition; partition++) {
        attend_partition(work, scratch, item, partition, last);
        if (item->partials) keep_partials(work, &scratch->part, item, rows, partition);
        else merge_partition(work, scratch, item, rows, partition);
    }
    for (long row = 0; row < rows && !item->partials; row++)
        write_row(work, item->run->row + token_of(work, item, row), head_of(work, item, row), scratch->total.sum[row],
                  scratch->total.mixed + row * width);
}

// The tokens of a run that have an item of their own for each partition: merges these.
static void merge_run(const Work *work, Scratch *scratch, const Run *run, const float *partials, long token) {
    long size = work->width + 2, partitions = partitions_of(work->call, run), heads = work->call->heads;
    long seen = pieces(keys_of_token(work->call, run, token), PARTITION);
    long first = first_key(work->call, run, token) / PARTITION;
    for (long head = 0; head < heads; head++) {
        const float *part = partials + ((token * heads + head) * partitions + first) * size;
        begin(&scratch->total, 1, work->width);
        for (long partition = first; partition < seen; partition++, part += size)
            merge(scratch->total.largest, scratch->total.sum, scratch->total.mixed, part[0], part[1], part + 2,
                  work->width);
        write_row(work, run->row + token, head, scratch->total.sum[0], scratch->total.mixed);
    }
}

// Rows of an item, with room behind for a whole vector of them.
static long item_rows(const Work *work) { return pieces(most(ITEM_ROWS, work->group), LANES) * LANES + LANES; }
static long panel_size(const Work *work) { return PANEL * most(work->width, BLOCK); }

static size_t thread_size(const Work *work) {
    long rows = item_rows(work);
    size_t floats = panel_size(work) + rows * (3 * work->width + BLOCK + 8) + 2 * BLOCK;
    return (floats * sizeof(float) + CACHE_LINE - 1) & ~(size_t)(CACHE_LINE - 1);
}

static Scratch scratch_of(const Work *work, int thread) {
    long rows = item_rows(work), width = work->width;
    Scratch scratch;
    float *at = scratch.panel = (float *)(work->call->scratch + thread * thread_size(work));
    scratch.queries = at += panel_size(work);
    scratch.part.mixed = at += rows * width;
    scratch.total.mixed = at += rows * width;
    scratch.scores = at += rows * width;
    scratch.key_scales = at += rows * BLOCK;
    scratch.value_scales = at += BLOCK;
    scratch.part.largest = at += BLOCK;
    scratch.part.sum = at += rows;
    scratch.total.largest = at += rows;
    scratch.total.sum = at += rows;
    scratch.highest = at += rows;
    scratch.kept = at += rows;
    scratch.unseen = (int *)(at += rows);
    scratch.seen = (int *)(at + rows);
    return scratch;
}

// Goes through all items, in the same order on every thread, and does those that it claims.
static void attend_claimed(const Work *work, Scratch *scratch) {
    const Attention *call = work->call;
    long index = 0, mine = atomic_fetch_add(call->claimed, 1);
    float *partials = work->partials;
    for (const Run *run = call->runs; run < call->runs + call->n_runs; run++) {
        Cut cut = cut_of(work, run);
        long token = (run->length - 1) / cut.tokens * cut.tokens;
        for (; token >= 0; token -= cut.tokens) {  // those with the most keys first
            long tokens = least(cut.tokens, run->length - token);
            long end = pieces(keys_of_token(call, run, token + tokens - 1), PARTITION);
            for (long first = first_key(call, run, token) / PARTITION; first < end; first += cut.partitions)
                for (long head = 0; head < call->kv_heads; head += cut.heads) {
                    if (index++ != mine) continue;
                    Item item = {run, token, tokens, head, cut.heads, first, least(first + cut.partitions, end),
                                 cut.spreads ? partials : NULL};
                    attend_item(work, scratch, &item);
                    mine = atomic_fetch_add(call->claimed, 1);
                }
        }
        if (cut.spreads) partials += partials_of(work, run);
    }
}

// Whether threads have enough to do where an item has all heads.
static int heads_together(const Attention *call, int n_threads) {
    long items = 0;
    for (const Run *run = call->runs; run < call->runs + call->n_runs && items < n_threads; run++)
        items += spreads(call, run) ? partitions_of(call, run) : 1;
    return items >= n_threads;
}

static Work work_of(const Attention *call, int n_threads) {
    Work work = {.call = call, .group = call->heads / call->kv_heads, .width = pieces(call->head_dim, LANES) * LANES,
                 .n_threads = n_threads, .heads_together = heads_together(call, n_threads)};
    work.scale = 1.44269504f / sqrtf((float)call->head_dim);  // scores are exponents of 2
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
