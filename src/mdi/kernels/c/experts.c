// A mixture of experts over rows: each row is multiplied with the weights of the few experts that its router chooses.
//
//   x -> router -> softmax, the highest `per_row` of each row -> rows copied, those of an expert together
//     -> gate, up of all chosen experts at once -> down of all -> residual + sum of outputs times shares
//
// A row's experts are summed in float32 in the order of their shares, and of their numbers where shares are equal, then
// rounded once; of shards, each shard's sum by itself: the bits of a row do not depend on the rows beside it. Weights of experts that no row chose are not read.
#include "experts.h"

#include "floats.h"
#include "memory.h"
#include "pool.h"

typedef struct {
    const Mixture *mixture;
    long hidden, inner, n_parts;  // n_parts: rows x per_row, what experts compute
    long n_shards;
    long *n_chosen;               // experts that a row chose
    Product *gate_up, *down;      // of these
    int32_t *chosen;              // [n_parts] experts
    float *shares;                // [n_parts]
    int32_t *places;              // [n_parts] among the copied rows
    int32_t *ends;                // [count]
    char *logits;                 // [rows][count]
    char *parts;                  // [shards][n_parts][hidden]: copied rows, then what experts made of them
    char *inners;                 // [n_parts][inner]
    char *scratch;                // of products
} Room;

static char *take(char **at, size_t size) {
    char *taken = *at;
    *at += (size + 63) & ~(size_t)63;
    return taken;
}

// Places in memory that begins at `at`. Returns where it ends, but for the scratch of products.
static Room room_of(const Mixture *mixture, char *at) {
    const Experts *experts = mixture->experts;
    long count = experts->count, item = dtype_bytes(mixture->dtype);
    Room room = {.mixture = mixture, .hidden = experts->router->inputs, .inner = experts->down[0]->inputs,
                 .n_parts = mixture->rows * experts->per_row, .n_shards = mixture->shards ? mixture->shards->count : 1};
    room.n_chosen = (long *)take(&at, sizeof(long));
    room.gate_up = (Product *)take(&at, count * sizeof(Product));
    room.down = (Product *)take(&at, count * sizeof(Product));
    room.chosen = (int32_t *)take(&at, room.n_parts * sizeof(int32_t));
    room.shares = (float *)take(&at, room.n_parts * sizeof(float));
    room.places = (int32_t *)take(&at, room.n_parts * sizeof(int32_t));
    room.ends = (int32_t *)take(&at, count * sizeof(int32_t));
    room.logits = take(&at, mixture->rows * count * item);
    room.parts = take(&at, room.n_shards * room.n_parts * room.hidden * item);
    room.inners = take(&at, room.n_parts * room.inner * item);
    room.scratch = at;
    return room;
}

size_t KERNEL(mixture_scratch)(const Mixture *mixture, int n_threads) {
    static char nothing;
    Room room = room_of(mixture, &nothing);
    long widest = room.hidden > room.inner ? room.hidden : room.inner;
    size_t products = KERNEL(products_scratch)(room.n_parts, widest, mixture->experts->count, n_threads);
    return (size_t)(room.scratch - &nothing) + products;
}

static void route(const Room *room, int thread, int n_threads) {
    const Mixture *mixture = room->mixture;
    Product product = {.weight = mixture->experts->router, .x = mixture->x, .out = room->logits, .rows = mixture->rows,
                       .dtype = mixture->dtype, .scratch = room->scratch};
    KERNEL(product_part)(&product, thread, n_threads);
    mdi_barrier();
}

// Of `size` numbers, filled up to whole vectors.
static void softmax(float *numbers, long size) {
    long filled = (size + LANES - 1) / LANES * LANES;
    float highest = numbers[0];
    for (long i = 1; i < size; i++) highest = numbers[i] > highest ? numbers[i] : highest;
    for (long i = size; i < filled; i++) numbers[i] = -INFINITY;
    vfloat sums = vf_zero();
    for (long i = 0; i < filled; i += LANES) {
        vfloat power = vf_exp(vf_sub(vf_load(numbers + i), vf_set1(highest)));
        vf_store(numbers + i, power);
        sums = vf_add(sums, power);
    }
    float sum = vf_sum(sums);
    for (long i = 0; i < size; i++) numbers[i] /= sum;
}

enum { TAKEN = -1 };  // in place of an expert's share

// The expert with the largest share that is not taken, the first of equal ones. Shares may be NaN.
static long largest_of(const float *shares, long count) {
    long best = TAKEN;
    for (long i = 0; i < count; i++)
        if (shares[i] != TAKEN && (best == TAKEN || shares[i] > shares[best])) best = i;
    return best;
}

static void choose_for(const Room *room, long row) {
    const Mixture *mixture = room->mixture;
    const Experts *experts = mixture->experts;
    long per_row = experts->per_row;
    int32_t *chosen = room->chosen + row * per_row;
    float all[experts->count + LANES], *shares = room->shares + row * per_row, sum = 0;
    widen_row(room->logits, row * experts->count, mixture->dtype, experts->count, all);
    softmax(all, experts->count);
    for (long i = 0; i < per_row; i++) {
        long best = largest_of(all, experts->count);
        chosen[i] = (int32_t)best;
        shares[i] = all[best];
        sum += all[best];
        all[best] = TAKEN;
    }
    for (long i = 0; i < per_row; i++) {
        float rounded;
        store_as(&rounded, 0, experts->normalised ? shares[i] / sum : shares[i], mixture->dtype);
        shares[i] = load_as(&rounded, 0, mixture->dtype);
    }
}

static void choose(const Room *room, int thread, int n_threads) {
    for (long row = thread; row < room->mixture->rows; row += n_threads) choose_for(room, row);
    mdi_barrier();
}

// Gives the rows of each chosen expert places side by side, and makes its products.
static void group(const Room *room) {
    const Mixture *mixture = room->mixture;
    const Experts *experts = mixture->experts;
    long item = dtype_bytes(mixture->dtype), end = 0, n_chosen = 0;
    memset(room->ends, 0, experts->count * sizeof *room->ends);
    for (long i = 0; i < room->n_parts; i++) room->ends[room->chosen[i]]++;
    for (long expert = 0; expert < experts->count; expert++) {
        long rows = room->ends[expert];
        room->ends[expert] = (int32_t)end;
        if (!rows) continue;
        char *part = room->parts + end * room->hidden * item, *inner = room->inners + end * room->inner * item;
        Product product = {.rows = rows, .dtype = mixture->dtype, .scratch = room->scratch};
        product.weight = experts->gate_up[expert], product.x = part, product.out = inner;
        room->gate_up[n_chosen] = product;
        product.weight = experts->down[expert], product.x = inner, product.out = part;
        if (mixture->shards) product.shards = mixture->shards, product.shard_stride = room->n_parts * room->hidden;
        room->down[n_chosen++] = product;
        end += rows;
    }
    for (long i = 0; i < room->n_parts; i++) room->places[i] = room->ends[room->chosen[i]]++;
    *room->n_chosen = n_chosen;
}

static void copy_rows(const Room *room, int thread, int n_threads) {
    long size = room->hidden * dtype_bytes(room->mixture->dtype), per_row = room->mixture->experts->per_row;
    const char *x = room->mixture->x;
    for (long i = thread; i < room->n_parts; i += n_threads)
        memcpy(room->parts + room->places[i] * size, x + i / per_row * size, size);
    mdi_barrier();
}

// Of LANES columns, or the last ones: what a shard of a row's experts adds up to.
INLINE vfloat sum_shard(const Room *room, long row, long shard, long column, int lanes, int dtype) {
    long per_row = room->mixture->experts->per_row, first = shard * room->n_parts * room->hidden + column;
    const int32_t *places = room->places + row * per_row;
    const float *shares = room->shares + row * per_row;
    vfloat sum = vf_zero();
    for (long i = 0; i < per_row; i++) {
        vfloat part = vf_load_few_as(room->parts, first + places[i] * room->hidden, lanes, dtype);
        sum = vf_fma(part, vf_set1(shares[i]), sum);
    }
    return room->mixture->shards ? vf_round_as(sum, dtype) : sum;
}

// Columns [begin, end) of one row: all of them by whole vectors, but for the last ones.
INLINE void add_parts(const Room *room, long row, long begin, long end, int dtype) {
    const Mixture *mixture = room->mixture;
    for (long column = begin; column < end; column += LANES) {
        int lanes = end - column < LANES ? (int)(end - column) : LANES;
        long at = row * room->hidden + column;
        vfloat total = vf_set1(-0.0f);  // to which a sum is added without a change
        for (long shard = 0; shard < room->n_shards; shard++) {
            vfloat sum = sum_shard(room, row, shard, column, lanes, dtype);
            if (mixture->shard_stride) vf_store_few_as(mixture->out, shard * mixture->shard_stride + at, sum, lanes, dtype);
            total = vf_add(total, sum);
        }
        if (mixture->shard_stride) continue;
        if (mixture->residual) total = vf_add(total, vf_load_few_as(mixture->residual, at, lanes, dtype));
        vf_store_few_as(mixture->out, at, total, lanes, dtype);
    }
}

static void add_all(const Room *room, int thread, int n_threads) {
    long vectors = (room->hidden + LANES - 1) / LANES, rows = room->mixture->rows;
    long begin = vectors * thread / n_threads * LANES, end = vectors * (thread + 1) / n_threads * LANES;
    if (end > room->hidden) end = room->hidden;
    for (long row = 0; row < rows; row++) {
        if (room->mixture->dtype == FLOAT32) add_parts(room, row, begin, end, FLOAT32);
        if (room->mixture->dtype == BFLOAT16) add_parts(room, row, begin, end, BFLOAT16);
        if (room->mixture->dtype == FLOAT16) add_parts(room, row, begin, end, FLOAT16);
    }
}

void KERNEL(mixture_part)(const Mixture *mixture, int thread, int n_threads) {
    Room room = room_of(mixture, mixture->scratch);
    route(&room, thread, n_threads);
    choose(&room, thread, n_threads);
    if (thread == 0) group(&room);
    mdi_barrier();
    copy_rows(&room, thread, n_threads);
    KERNEL(products_part)(room.gate_up, *room.n_chosen, thread, n_threads);
    mdi_barrier();
    KERNEL(products_part)(room.down, *room.n_chosen, thread, n_threads);
    mdi_barrier();
    add_all(&room, thread, n_threads);
}

static void run_part(void *mixture, int thread, int n_threads) { KERNEL(mixture_part)(mixture, thread, n_threads); }

int KERNEL(mixture)(const Experts *experts, const void *x, void *out, const void *residual, long rows, int dtype,
                    const Shards *shards, int64_t shard_stride) {
    if (!rows) return 0;
    Mixture mixture = {.experts = experts, .x = x, .residual = residual, .out = out, .rows = rows, .dtype = dtype,
                       .shards = shards, .shard_stride = shard_stride};
    mixture.scratch = mdi_scratch(KERNEL(mixture_scratch)(&mixture, mdi_threads()));
    if (!mixture.scratch) return 1;
    mdi_parallel(run_part, &mixture);
    return 0;
}
