/* Rounds a block of columns, each after the changes of those before it are passed on (emloc_core/algorithms/native.py).

   Matrices are transposed: a column of m numbers is one stretch of memory. Rows are independent, so a few of them go
   through all columns while they are in the cache. */

#include <stdint.h>
#include <string.h>

enum { ROWS = 64 }; /* COLUMNS is given to the compiler */

/* What numbers may be rounded to; see emloc_core/algorithms/grid.py. */
typedef struct {
    const float *levels, *middles, *scales;
    const uint8_t *kept; /* NULL: no number stays */
    const float *originals;
    int64_t count, width;
} Grid;

/* Rounds numbers of a column, those from `row` on. */
static void nearest(float *numbers, const Grid *grid, int64_t column, int64_t row, int64_t rows, int64_t m)
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

/* Subtracts from numbers of a column what the changes of the columns before it pass on to it. */
static void pass_on(float *numbers, float changes[][ROWS], const float *weights, int64_t column, int64_t k)
{
    for (int64_t before = 0; before < column; before++) {
        const float weight = weights[before * k + column];
        for (int r = 0; r < ROWS; r++) numbers[r] -= weight * changes[before][r];
    }
}

void round_block(float *block, float *changes, const float *factor, const int64_t *positions, int64_t k, int64_t m,
                 Grid grid)
{
    for (int64_t row = 0; row < m; row += ROWS) {
        const int64_t rows = m - row < ROWS ? m - row : ROWS;
        float changed[COLUMNS][ROWS] = {{0}};
        for (int64_t column = 0; column < k; column++) {
            float numbers[ROWS] = {0}, *original = changes + column * m + row;
            memcpy(numbers, block + column * m + row, rows * sizeof(float));
            pass_on(numbers, changed, factor, column, k);
            nearest(numbers, &grid, positions[column], row, rows, m);
            memcpy(block + column * m + row, numbers, rows * sizeof(float));
            for (int64_t r = 0; r < rows; r++) original[r] = changed[column][r] = numbers[r] - original[r];
        }
    }
}

void descend_block(float *block, const float *slopes, float *changes, const float *curvature, int64_t start, int64_t k,
                   int64_t m, Grid grid)
{
    for (int64_t row = 0; row < m; row += ROWS) {
        const int64_t rows = m - row < ROWS ? m - row : ROWS;
        float changed[COLUMNS][ROWS] = {{0}};
        for (int64_t column = 0; column < k; column++) {
            float numbers[ROWS] = {0}, *before = block + column * m + row;
            const float pivot = curvature[column * k + column];
            memcpy(numbers, slopes + column * m + row, rows * sizeof(float));
            pass_on(numbers, changed, curvature, column, k);
            for (int64_t r = 0; r < rows; r++) numbers[r] = numbers[r] / pivot + before[r];
            nearest(numbers, &grid, start + column, row, rows, m);
            for (int64_t r = 0; r < rows; r++) changed[column][r] = numbers[r] - before[r];
            memcpy(before, numbers, rows * sizeof(float));
            memcpy(changes + column * m + row, changed[column], rows * sizeof(float));
        }
    }
}
