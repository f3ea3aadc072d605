/* Finds the sequence of a trellis code that is nearest to numbers (emloc_core/algorithms/trellis.py). */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { STATES = 1 << STATE_BITS }; /* STATE_BITS is given to the compiler */

/* From what it costs to be in every state to what it costs after one more number, of K bits. A state is reached from
   those whose last bits are its first ones; `from` has, of the cheapest, the K bits that are no longer seen. */
#define STEP(K)                                                                                                        \
    static void step_##K(const float *restrict cost, float *restrict next, uint8_t *restrict from,                     \
                         const float *restrict table, float number, float scale)                                       \
    {                                                                                                                  \
        enum { SHARED = STATES >> K };                                                                                 \
        float least[SHARED];                                                                                           \
        for (int shared = 0; shared < SHARED; shared++) {                                                              \
            float best = cost[shared];                                                                                 \
            int32_t gone = 0;                                                                                          \
            for (int bits = 1; bits < 1 << K; bits++) {                                                                \
                const float other = cost[bits * SHARED + shared];                                                      \
                gone = other < best ? bits : gone;                                                                     \
                best = other < best ? other : best;                                                                    \
            }                                                                                                          \
            least[shared] = best;                                                                                      \
            from[shared] = gone;                                                                                       \
        }                                                                                                              \
        for (int shared = 0; shared < SHARED; shared++)                                                                \
            for (int bits = 0; bits < 1 << K; bits++) {                                                                \
                const float missed = number - scale * table[(shared << K) + bits];                                     \
                next[(shared << K) + bits] = least[shared] + missed * missed;                                          \
            }                                                                                                          \
    }
STEP(2)
STEP(3)

/* Of the three numbers of a byte, the first one has two bits, and the others have three. */
static inline int bits_of(int64_t row)
{
    return row % 3 ? 3 : 2;
}

/* Writes the state after each of m numbers. Returns 1 where memory runs out. */
int find_states(const float *numbers, const float *scales, uint16_t *states, int64_t m, const float *table)
{
    float costs[2][STATES], *cost = costs[0], *next = costs[1];
    uint8_t *from = malloc(m * (STATES / 4));
    if (!from) return 1;
    for (int state = 0; state < STATES; state++) cost[state] = state ? INFINITY : 0; /* before the first number are zeros */
    for (int64_t row = 0; row < m; row++) {
        (bits_of(row) == 2 ? step_2 : step_3)(cost, next, from + row * (STATES / 4), table, numbers[row], scales[row]);
        float *const before = cost;
        cost = next, next = before;
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
