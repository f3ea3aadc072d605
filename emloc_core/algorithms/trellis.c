/* Rounds columns to what has a trellis code (emloc_core/algorithms/trellis.py). */

#include <math.h>
#include <stdint.h>

enum { ROWS = SEGMENT, STATES = 1 << STATE_BITS, LANES = 16 }; /* SEGMENT and STATE_BITS are given to the compiler */
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

/* From what it costs to be in every state to what it costs after one more number, of so many bits. A state is reached
   from those whose last bits are its first ones; `from` has, of the cheapest, the bits that are no longer seen. */
static inline __attribute__((always_inline)) void step(const int bits, float *cost, uint8_t *restrict from,
                                                       const float *table, float number, float scale)
{
    float least[STATES / 4];
    const int shared = STATES >> bits;
    for (int last = 0; last < shared; last++) {
        float best = cost[last];
        int32_t gone = 0;
        for (int first = 1; first < 1 << bits; first++) {
            const float other = cost[first * shared + last];
            gone = other < best ? first : gone;
            best = other < best ? other : best;
        }
        least[last] = best;
        from[last] = gone;
    }
    /* By hand: gcc would gather and scatter, which takes three times as long. */
    for (int state = 0; state < STATES; state += LANES << bits) {
        const lanes few = *(const lanes *)(least + (state >> bits));
#pragma GCC unroll 8
        for (int part = 0; part < LANES << bits; part += LANES) {
            lanes before;
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; lane++) before[lane] = few[(part + lane) >> bits];
            const lanes missed = number - scale * *(const lanes *)(table + state + part);
            *(lanes *)(cost + state + part) = before + missed * missed;
        }
    }
}

/* Of the three numbers of a byte, the first one has two bits, and the others have three. */
static inline int bits_of(int64_t row)
{
    return row % 3 ? 3 : 2;
}

/* What numbers may be rounded to, and the states of those that they were rounded to last. */
typedef struct {
    const float *scales, *values;
    uint16_t *states;
    int64_t width;
} Values;

/* Rounds numbers of a column, those of a segment from `row` on. */
static void nearest(float *numbers, const Values *code, int64_t column, int64_t row, int64_t rows, int64_t m)
{
    const float *scales = code->scales + column / code->width * m + row;
    uint16_t *states = code->states + column * m + row;
    uint8_t from[SEGMENT][STATES / 4];
    float cost[STATES];
    for (int state = 0; state < STATES; state++) cost[state] = state ? INFINITY : 0; /* before the first number are zeros */
    for (int64_t r = 0; r < rows; r++)
        if (bits_of(r) == 2) step(2, cost, from[r], code->values, numbers[r], scales[r]);
        else step(3, cost, from[r], code->values, numbers[r], scales[r]);
    int state = 0;
    for (int other = 1; other < STATES; other++) state = cost[other] < cost[state] ? other : state;
    for (int64_t r = rows - 1; r >= 0; r--) {
        const int own = bits_of(r);
        states[r] = state;
        numbers[r] = code->values[state] * scales[r];
        state >>= own;
        state |= from[r][state] << (STATE_BITS - own);
    }
}

#include "columns.h"
