/* Finds the sequence of a trellis code that is nearest to numbers (emloc_core/algorithms/trellis.py). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { STATES = 1 << STATE_BITS, LANES = 16 }; /* STATE_BITS is given to the compiler */
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

/* Writes the state after each of m numbers. Returns 1 where memory runs out. */
int find_states(const float *numbers, const float *scales, uint16_t *states, int64_t m, const float *table)
{
    float cost[STATES];
    uint8_t *from = malloc(m * (STATES / 4));
    if (!from) return 1;
    for (int state = 0; state < STATES; state++) cost[state] = state ? INFINITY : 0; /* before the first number are zeros */
    for (int64_t row = 0; row < m; row++) {
        uint8_t *of_row = from + row * (STATES / 4);
        if (bits_of(row) == 2) step(2, cost, of_row, table, numbers[row], scales[row]);
        else step(3, cost, of_row, table, numbers[row], scales[row]);
    }
    int state = 0;
    for (int other = 1; other < STATES; other++) state = cost[other] < cost[state] ? other : state;
    for (int64_t row = m - 1; row >= 0; row--) {
        const int own = bits_of(row);
        states[row] = state;
        state >>= own;
        state |= from[row * (STATES / 4) + state] << (STATE_BITS - own);
    }
    free(from);
    return 0;
}
