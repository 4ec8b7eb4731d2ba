/* y[t, n] = sum_k x[t, k] * w[n, k] + bias[n] for few rows t and weights w as they lie.
 *
 * Weights are read from memory once, whatever the number of rows, ahead of their use. Those
 * of bfloat16 are multiplied in pairs, or widened in registers. The sum runs over k in
 * chunks, so that the rows of x of a chunk stay in the first-level cache. Every (t, n) is
 * summed in one order that depends on k alone, so a row's result doesn't depend on how many
 * rows there are.
 */
#include "vectors.h"

#if LANES == 16
#define COLS 4 /* weight rows per tile */
#define ROWS 4 /* activation rows per tile, at most 6 */
#elif LANES == 8
#define COLS 2
#define ROWS 6
#else
#define COLS 4
#define ROWS 4
#endif

#define GROUP 16 /* weight rows that share a chunk of x */
#define CHUNK 512 /* of k: ROWS x CHUNK floats and GROUP x CHUNK weights fit in 48 KiB */

#define FEW(n) ((n) < ROWS ? (n) : ROWS)

#define TILE(KIND, NAME, TYPE)                                                          \
    static inline __attribute__((always_inline)) void NAME(                             \
        const KIND##_X *x, long stride, const TYPE *const *w, const char *const *ahead, \
        long count, int rows, float *out, long out_stride) {                            \
        vfloat acc[ROWS * COLS];                                                        \
        float sums[ROWS * COLS < 16 ? 16 : ROWS * COLS];                                \
        UNROLLED for (int i = 0; i < rows * COLS; i++) acc[i] = (vfloat){0};            \
        for (long k = 0; k < count; k += KIND##_STEP) {                                 \
            vword word[COLS];                                                           \
            UNROLLED for (int c = 0; c < COLS; c++) {                                   \
                memcpy(&word[c], w[c] + k, sizeof(vword));                              \
                if (ahead) __builtin_prefetch(ahead[c] + k * sizeof(TYPE));             \
            }                                                                           \
            UNROLLED for (int h = 0; h < KIND##_HALVES; h++) {                          \
                vword wide[COLS];                                                       \
                UNROLLED for (int c = 0; c < COLS; c++)                                 \
                    wide[c] = KIND##_HALF(word[c], h);                                  \
                UNROLLED for (int r = 0; r < rows; r++)                                 \
                    UNROLLED for (int c = 0; c < COLS; c++)                             \
                        acc[r * COLS + c] =                                             \
                            KIND##_ADD(acc[r * COLS + c],                               \
                                       x + r * stride + k + h * LANES, wide[c]);        \
            }                                                                           \
        }                                                                               \
        totals(acc, rows * COLS, sums);                                                 \
        UNROLLED for (int r = 0; r < rows; r++)                                         \
            UNROLLED for (int c = 0; c < COLS; c++)                                     \
                out[r * out_stride + c] += sums[r * COLS + c];                          \
    }                                                                                   \
    static __attribute__((noinline)) void NAME##_rows(                                  \
        const KIND##_X *x, long stride, const TYPE *const *w, const char *const *ahead, \
        long count, int rows, float *out, long out_stride) {                            \
        switch (rows * 2 + (ahead != 0)) {                                              \
        case 2: NAME(x, stride, w, 0, count, FEW(1), out, out_stride); break;           \
        case 3: NAME(x, stride, w, ahead, count, FEW(1), out, out_stride); break;       \
        case 4: NAME(x, stride, w, 0, count, FEW(2), out, out_stride); break;           \
        case 5: NAME(x, stride, w, ahead, count, FEW(2), out, out_stride); break;       \
        case 6: NAME(x, stride, w, 0, count, FEW(3), out, out_stride); break;           \
        case 7: NAME(x, stride, w, ahead, count, FEW(3), out, out_stride); break;       \
        case 8: NAME(x, stride, w, 0, count, FEW(4), out, out_stride); break;           \
        case 9: NAME(x, stride, w, ahead, count, FEW(4), out, out_stride); break;       \
        case 10: NAME(x, stride, w, 0, count, FEW(5), out, out_stride); break;          \
        case 11: NAME(x, stride, w, ahead, count, FEW(5), out, out_stride); break;      \
        case 12: NAME(x, stride, w, 0, count, FEW(6), out, out_stride); break;          \
        case 13: NAME(x, stride, w, ahead, count, FEW(6), out, out_stride); break;      \
        }                                                                               \
    }

TILE(BF16, tile_bf16, uint16_t)
TILE(F32, tile_f32, float)

/* NAME_part is a thread's share, inside a parallel region; it doesn't wait for the others.
 * Rows of x are `stride` apart and filled up with zeros, those of y y_row. */
#define LINEAR(KIND, NAME, TYPE, TILE_OF, STORE, BIAS)                                  \
    void NAME##_part(const void *x_rows, long stride, const void *weight,               \
                     const void *biases, void *y_rows, long y_row, long t_count,        \
                     long n_count, long k_count) {                                      \
        const KIND##_X *x = x_rows;                                                     \
        const TYPE *w = weight, *bias = biases;                                         \
        TYPE *y = y_rows;                                                               \
        long full = k_count / KIND##_STEP * KIND##_STEP;                                \
        long tiles = (t_count + ROWS - 1) / ROWS; /* of nearly as many rows each */     \
        long groups = (n_count + GROUP - 1) / GROUP;                                    \
        float *sums = malloc(t_count * GROUP * sizeof(float));                          \
        _Pragma("omp for schedule(static) nowait")                                      \
        for (long group = 0; group < groups; group++) {                                 \
            long n0 = group * GROUP;                                                    \
            long cols = n_count - n0 < GROUP ? n_count - n0 : GROUP;                    \
            memset(sums, 0, t_count * GROUP * sizeof(float));                           \
            for (long k0 = 0; k0 < full; k0 += CHUNK) {                                 \
                long count = full - k0 < CHUNK ? full - k0 : CHUNK;                     \
                long next = k0 + CHUNK < full ? CHUNK : GROUP * k_count - k0;           \
                for (long t = 0, tile = tiles, rows; tile > 0; tile--, t += rows) {     \
                    rows = (t_count - t + tile - 1) / tile;                             \
                    for (long c0 = 0; c0 < cols; c0 += COLS) {                          \
                        const TYPE *row[COLS];                                          \
                        const char *ahead[COLS];                                        \
                        for (int c = 0; c < COLS; c++) {                                \
                            long n = c0 + c < cols ? c0 + c : cols - 1;                 \
                            row[c] = w + (n0 + n) * k_count + k0;                       \
                            ahead[c] = (const char *)(row[c] + next);                   \
                        }                                                               \
                        TILE_OF##_rows(x + t * stride + k0, stride, row,                \
                                       t ? 0 : ahead, count, (int)rows,                 \
                                       sums + t * GROUP + c0, GROUP);                   \
                    }                                                                   \
                }                                                                       \
            }                                                                           \
            if (full != k_count) {                                                      \
                for (long c0 = 0; c0 < cols; c0 += COLS) {                              \
                    TYPE tail[COLS][KIND##_STEP];                                       \
                    const TYPE *row[COLS];                                              \
                    memset(tail, 0, sizeof tail);                                       \
                    for (int c = 0; c < COLS; c++) {                                    \
                        long n = c0 + c < cols ? c0 + c : cols - 1;                     \
                        memcpy(tail[c], w + (n0 + n) * k_count + full,                  \
                               (k_count - full) * sizeof(TYPE));                        \
                        row[c] = tail[c];                                               \
                    }                                                                   \
                    for (long t = 0, tile = tiles, rows; tile > 0; tile--, t += rows) { \
                        rows = (t_count - t + tile - 1) / tile;                         \
                        TILE_OF##_rows(x + t * stride + full, stride, row, 0,           \
                                       KIND##_STEP, (int)rows,                          \
                                       sums + t * GROUP + c0,                           \
                                       GROUP);                                          \
                    }                                                                   \
                }                                                                       \
            }                                                                           \
            for (long t = 0; t < t_count; t++)                                          \
                for (long c = 0; c < cols; c++) {                                       \
                    float sum = sums[t * GROUP + c];                                    \
                    if (bias) sum += BIAS(bias[n0 + c]);                                \
                    y[t * y_row + n0 + c] = STORE(sum);                                 \
                }                                                                       \
        }                                                                               \
        free(sums);                                                                     \
    }                                                                                   \
    void NAME(const KIND##_X *x, long stride, const TYPE *w, const TYPE *bias, TYPE *y, \
              long t_count, long n_count, long k_count, int threads) {                  \
        _Pragma("omp parallel num_threads(threads)")                                    \
        NAME##_part(x, stride, w, bias, y, n_count, t_count, n_count, k_count);         \
    }

LINEAR(BF16, linear_bf16, uint16_t, tile_bf16, narrow, widen)
LINEAR(F32, linear_f32, float, tile_f32, SAME, SAME)

/* Rows of x as zero-padded float rows of `stride`: of every BF16_STEP elements the even
 * ones first, as the weights' words give them. */
void widen_rows(const uint16_t *x, float *out, long t_count, long k_count, long stride) {
    for (long t = 0; t < t_count; t++) {
        const uint16_t *from = x + t * k_count;
        float *to = out + t * stride;
        for (long k = 0; k < stride; k += BF16_STEP)
            for (int h = 0; h < 2; h++)
                for (int i = 0; i < LANES; i++) {
                    long at = k + 2 * i + h;
                    to[k + h * LANES + i] = at < k_count ? widen(from[at]) : 0.0f;
                }
    }
}

int lanes(void) { return LANES; }
