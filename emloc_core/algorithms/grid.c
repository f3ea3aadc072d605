/* Rounds columns to a few levels (emloc_core/algorithms/native.py). */

#include <stdint.h>
#include <string.h>

enum { ROWS = 64 };

/* What numbers may be rounded to; see emloc_core/algorithms/grid.py. */
typedef struct {
    const float *levels, *middles, *scales;
    const uint8_t *kept; /* NULL: no number stays */
    const float *originals;
    int64_t count, width;
} Values;

/* Rounds numbers of a column, those from `row` on. */
static void nearest(float *numbers, const Values *grid, int64_t column, int64_t row, int64_t rows, int64_t m)
{
    float scale[ROWS], unit[ROWS], rounded[ROWS];
    for (int r = 0; r < ROWS; r++) scale[r] = 1;
    memcpy(scale, grid->scales + column / grid->width * m + row, rows * sizeof(float));
    for (int r = 0; r < ROWS; r++) {
        unit[r] = numbers[r] / scale[r];
        rounded[r] = grid->levels[0];
    }
    for (int64_t level = 1; level < grid->count; level++) {
        const float above = grid->middles[level - 1], value = grid->levels[level];
        for (int r = 0; r < ROWS; r++) rounded[r] = unit[r] > above ? value : rounded[r];
    }
    for (int r = 0; r < ROWS; r++) numbers[r] = rounded[r] * scale[r];
    if (grid->kept)
        for (int64_t r = 0; r < rows; r++)
            if (grid->kept[column * m + row + r]) numbers[r] = grid->originals[column * m + row + r];
}

#include "columns.h"
