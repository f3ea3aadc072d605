/* Rounds a block of columns, each after the changes of those before it are passed on (emloc_core/algorithms/native.py).

   Matrices are transposed: a column of m numbers is one stretch of memory. Rows are independent, so ROWS of them go
   through all columns while they are in the cache: those from `begin` to `end`. What includes this defines ROWS, the
   Values that numbers may be rounded to, and the function `nearest`. */

#include <string.h>

/* Subtracts from numbers of a column what the changes of the columns before it pass on to it. */
static void pass_on(float *numbers, float changes[][ROWS], const float *weights, int64_t column, int64_t k)
{
    for (int64_t before = 0; before < column; before++) {
        const float weight = weights[before * k + column];
        for (int r = 0; r < ROWS; r++) numbers[r] -= weight * changes[before][r];
    }
}

void round_block(float *block, float *changes, const float *factor, const int64_t *positions, int64_t k, int64_t m,
                 int64_t begin, int64_t end, Values values)
{
    for (int64_t row = begin; row < end; row += ROWS) {
        const int64_t rows = end - row < ROWS ? end - row : ROWS;
        float changed[COLUMNS][ROWS] = {{0}};
        for (int64_t column = 0; column < k; column++) {
            float numbers[ROWS] = {0}, *original = changes + column * m + row;
            memcpy(numbers, block + column * m + row, rows * sizeof(float));
            pass_on(numbers, changed, factor, column, k);
            nearest(numbers, &values, positions[column], row, rows, m);
            memcpy(block + column * m + row, numbers, rows * sizeof(float));
            for (int64_t r = 0; r < rows; r++) original[r] = changed[column][r] = numbers[r] - original[r];
        }
    }
}

void descend_block(float *block, const float *slopes, float *changes, const float *curvature, int64_t start, int64_t k,
                   int64_t m, int64_t begin, int64_t end, Values values)
{
    for (int64_t row = begin; row < end; row += ROWS) {
        const int64_t rows = end - row < ROWS ? end - row : ROWS;
        float changed[COLUMNS][ROWS] = {{0}};
        for (int64_t column = 0; column < k; column++) {
            float numbers[ROWS] = {0}, *before = block + column * m + row;
            const float pivot = curvature[column * k + column];
            memcpy(numbers, slopes + column * m + row, rows * sizeof(float));
            pass_on(numbers, changed, curvature, column, k);
            for (int64_t r = 0; r < rows; r++) numbers[r] = numbers[r] / pivot + before[r];
            nearest(numbers, &values, start + column, row, rows, m);
            for (int64_t r = 0; r < rows; r++) changed[column][r] = numbers[r] - before[r];
            memcpy(before, numbers, rows * sizeof(float));
            memcpy(changes + column * m + row, changed[column], rows * sizeof(float));
        }
    }
}
