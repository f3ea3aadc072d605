/* Unpacks factors on four levels, and weights in trellis codes (emloc_core/algorithms/native.py), a piece of a row at a time. */

#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

enum { PIECE = 256, DIGITS = 4 };

static inline uint16_t bfloat16(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to the nearest; of two, the even one */
}

static inline float float32(uint16_t number)
{
    const uint32_t bits = (uint32_t)number << 16;
    float widened;
    memcpy(&widened, &bits, sizeof widened);
    return widened;
}

/* Writes numbers, times their scale, in fp32 or bf16, from an index on. */
static inline void write_scaled(void *out, int64_t first, const float *units, int64_t count, float scale, int64_t in_fp32)
{
    if (in_fp32)
        for (int64_t i = 0; i < count; i++) ((float *)out)[first + i] = units[i] * scale;
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[first + i] = bfloat16(units[i] * scale);
}

/* Unpacks rows of a stack of matrices, (m, n), on four levels, into fp32 or bf16. A byte holds four numbers, and `table`
   the levels of each; `width` numbers of a row share a scale. */
void unpack_levels(const uint8_t *codes, const uint16_t *scales, const float *table, void *out, int64_t begin,
                   int64_t end, int64_t m, int64_t n, int64_t bytes, int64_t width, int64_t in_fp32)
{
    const int64_t groups = (n + width - 1) / width;
    for (int64_t row = begin; row < end; row++)
        for (int64_t start = 0, stop; start < n; start = stop) {
            const int64_t group = start / width, first = row % m * n + start, skipped = first % DIGITS;
            stop = start + PIECE < n ? start + PIECE : n;
            if (stop > (group + 1) * width) stop = (group + 1) * width;
            const int64_t count = stop - start, taken = (skipped + count + DIGITS - 1) / DIGITS;
            const uint8_t *of_piece = codes + row / m * bytes + first / DIGITS;
            const float scale = float32(scales[row * groups + group]);
            float units[PIECE + 2 * DIGITS];
            for (int64_t i = 0; i < taken; i++)
                memcpy(units + i * DIGITS, table + of_piece[i] * DIGITS, DIGITS * sizeof(float));
            write_scaled(out, row * n + start, units + skipped, count, scale, in_fp32);
        }
}

/* Unpacks rows of a stack of matrices, (m, n), in a trellis code, into fp32 or bf16. A byte holds three numbers of a
   column, of which each sees the last STATE_BITS; no bit is seen from the rows of another segment. */
void unpack_trellis(const uint8_t *codes, const uint16_t *scales, const float *table, void *out, int64_t begin,
                    int64_t end, int64_t m, int64_t n, int64_t width, int64_t in_fp32)
{
    const int64_t groups = (n + width - 1) / width, bytes = (m + 2) / 3;
    static const uint8_t none[PIECE];
    for (int64_t row = begin; row < end; row++) {
        const int64_t r = row % m, unseen = 8 - 8 * (r % 3 + 1) / 3, depth = r % SEGMENT / 3;
        for (int64_t start = 0, stop; start < n; start = stop) {
            stop = start + PIECE < n ? start + PIECE : n;
            if (stop > (start / width + 1) * width) stop = (start / width + 1) * width;
            const uint8_t *own = codes + (row / m * bytes + r / 3) * n + start;
            const uint8_t *before = depth > 0 ? own - n : none, *earlier = depth > 1 ? own - 2 * n : none;
            const float scale = float32(scales[row * groups + start / width]);
            uint16_t states[PIECE]; /* first all of them, many at a time, then their values: twice as fast as both at once */
            float units[PIECE];
            for (int64_t i = 0; i < stop - start; i++)
                states[i] = (earlier[i] << 16 | before[i] << 8 | own[i]) >> unseen & ((1 << STATE_BITS) - 1);
            for (int64_t i = 0; i < stop - start; i++) units[i] = table[states[i]];
            write_scaled(out, row * n + start, units, stop - start, scale, in_fp32);
        }
    }
}

/* Asks for large pages: the system takes longer to hand out so much memory in small ones than it takes to fill it. */
void use_large_pages(uintptr_t address, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 12, begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
}
