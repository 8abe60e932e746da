// What drawing a token needs of all logits of a row. A block of it is computed by one thread, in a fixed order.
#include "vocabulary.h"

#include <stdlib.h>

#include "pool.h"
#include "vector.h"

static float highest_of(const float *logits, long size) {
    vfloat highest = vf_set1(-INFINITY);
    long i = 0;
    for (; i + LANES <= size; i += LANES) highest = vf_max(vf_load(logits + i), highest);
    float found = vf_largest(highest);
    for (; i < size; i++) found = logits[i] > found ? logits[i] : found;
    return found;
}

static double sum_of_block(const float *logits, long size, float highest, float scale) {
    vfloat sums = vf_zero();
    for (long i = 0; i < size; i += LANES) {
        int rest = size - i < LANES ? (int)(size - i) : LANES;
        float filled[LANES];
        const float *from = logits + i;
        if (rest < LANES) {
            for (int lane = 0; lane < LANES; lane++) filled[lane] = lane < rest ? from[lane] : -INFINITY;
            from = filled;
        }
        sums = vf_add(sums, vf_exp(vf_mul(vf_sub(vf_load(from), vf_set1(highest)), vf_set1(scale))));
    }
    return vf_sum(sums);
}

static void find_peak(const Peaks *peaks, long row, long block, long blocks) {
    const float *logits = peaks->logits + row * peaks->size + block * BLOCK;
    long size = peaks->size - block * BLOCK < BLOCK ? peaks->size - block * BLOCK : BLOCK;
    float highest = highest_of(logits, size);
    peaks->highest[row * blocks + block] = highest;
    peaks->sums[row * blocks + block] =
        highest == -INFINITY ? 0 : sum_of_block(logits, size, highest, peaks->scales[row]);
}

static void run_peaks(void *context, int thread, int n_threads) {
    const Peaks *peaks = context;
    long blocks = (peaks->size + BLOCK - 1) / BLOCK, all = peaks->rows * blocks;
    for (long i = all * thread / n_threads; i < all * (thread + 1) / n_threads; i++)
        find_peak(peaks, i / blocks, i % blocks, blocks);
}

void KERNEL(peaks)(const Peaks *peaks) { mdi_parallel(run_peaks, (void *)peaks); }

// An integer whose order among integers is that of the float among floats; 0 and -0 are equal.
static inline uint32_t ordered(float value) {
    uint32_t bits = bits_of(value + 0.0f);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

enum { DIGITS = 1 << 11 };
static const int SHIFTS[] = {21, 10, 0};  // of the digits of a number, from the highest on

// The digit that the count-th highest of these numbers has at `shift`; takes those with a higher one off the count.
static uint32_t digit_of_nth(const uint32_t *numbers, long size, int shift, int64_t *count) {
    uint32_t often[DIGITS] = {0}, digit = DIGITS - 1;
    for (long i = 0; i < size; i++) often[numbers[i] >> shift & (DIGITS - 1)]++;
    while (often[digit] < *count) *count -= often[digit--];
    return digit;
}

// The count-th highest of these numbers, by its digits from the highest on; numbers with other digits are dropped.
// Leaves in count how many of those that equal it are among the highest.
static uint32_t nth_highest(uint32_t *numbers, long size, int64_t *count) {
    for (size_t k = 0; k < sizeof SHIFTS / sizeof *SHIFTS; k++) {
        uint32_t digit = digit_of_nth(numbers, size, SHIFTS[k], count);
        long kept = 0;
        for (long i = 0; i < size; i++)
            if ((numbers[i] >> SHIFTS[k] & (DIGITS - 1)) == digit) numbers[kept++] = numbers[i];
        size = kept;
    }
    return numbers[0];
}

enum { SMALL_BLOCK = 64 };

// The numbers of the highest logits of blocks. At least as many logits are as high as the n-th highest of them.
static long block_peaks(const float *logits, long size, uint32_t *peaks) {
    long blocks = 0;
    for (long block = 0; block < size; block += SMALL_BLOCK)
        peaks[blocks++] = ordered(highest_of(logits + block, size - block < SMALL_BLOCK ? size - block : SMALL_BLOCK));
    return blocks;
}

// Collects the indices of logits whose numbers are `lowest` or more, from the blocks that have such. Returns how many.
static long collect(const float *logits, long size, const uint32_t *peaks, uint32_t lowest, int64_t *indices) {
    long found = 0;
    for (long block = 0; block < size; block += SMALL_BLOCK) {
        if (*peaks++ < lowest) continue;
        for (long i = block; i < size && i < block + SMALL_BLOCK; i++)
            if (ordered(logits[i]) >= lowest) indices[found++] = i;
    }
    return found;
}

// Drops from ascending indices all but those of the `count` highest logits.
static long keep_highest(const float *logits, int64_t *indices, long size, int64_t count, uint32_t *numbers) {
    for (long i = 0; i < size; i++) numbers[i] = ordered(logits[indices[i]]);
    uint32_t lowest = nth_highest(numbers, size, &count);
    long kept = 0;
    for (long i = 0; i < size; i++) {
        uint32_t number = ordered(logits[indices[i]]);
        if (number > lowest || (number == lowest && count-- > 0)) indices[kept++] = indices[i];
    }
    return kept;
}

int64_t KERNEL(highest)(const float *logits, int64_t size, int64_t count, int64_t *indices) {
    long blocks = size / SMALL_BLOCK + 1;
    uint32_t *peaks = malloc((size_t)(2 * blocks + size) * sizeof *peaks), *numbers = peaks + 2 * blocks;
    int64_t *candidates = malloc((size_t)size * sizeof *candidates), n = count;
    long found = -1;
    if (peaks && candidates) {
        uint32_t lowest = ordered(-INFINITY) + 1;  // not forbidden
        blocks = block_peaks(logits, size, peaks);
        if (count <= blocks) {
            memcpy(peaks + blocks, peaks, (size_t)blocks * sizeof *peaks);
            uint32_t bound = nth_highest(peaks + blocks, blocks, &n);
            lowest = bound > lowest ? bound : lowest;
        }
        found = collect(logits, size, peaks, lowest, candidates);
        if (found > count) found = keep_highest(logits, candidates, found, count, numbers);
        memcpy(indices, candidates, (size_t)found * sizeof *indices);
    }
    free(peaks);
    free(candidates);
    return found;
}
