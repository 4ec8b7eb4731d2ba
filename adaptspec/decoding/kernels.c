/* y[t, n] = sum_k x[t, k] * w[n, k] + bias[n] for few rows t and streamed weights w.
 *
 * Weights are read from memory once whatever the number of rows, and widened to float in
 * registers. Every (t, n) is summed in one order that depends on k alone, so a row's
 * result doesn't depend on how many rows there are.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define COLS 4 /* weight rows per tile */
#define ROWS 4 /* activation rows per tile */

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef uint32_t vword __attribute__((vector_size(LANES * 4)));
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2)));

static inline vfloat load_float(const float *p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vfloat load_bf16(const uint16_t *p) {
    vhalf v;
    memcpy(&v, p, sizeof v);
    return (vfloat)(__builtin_convertvector(v, vword) << 16);
}

static inline float widen(uint16_t h) {
    uint32_t w = (uint32_t)h << 16;
    float f;
    memcpy(&f, &w, sizeof f);
    return f;
}

static inline uint16_t narrow(float f) {
    uint32_t w;
    memcpy(&w, &f, sizeof w);
    if ((w & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((w >> 16) | 0x40u);
    return (uint16_t)((w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
}

static inline float total(vfloat v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* One tile: `rows` x COLS sums over k, with x padded to a multiple of LANES by zeros. */
#define TILE(NAME, TYPE, LOAD)                                                          \
    static inline __attribute__((always_inline)) void NAME(                             \
        const float *x, long stride, const TYPE *const *w, const TYPE (*tail)[LANES],    \
        long full, int has_tail, int rows, float out[ROWS][COLS]) {                     \
        vfloat acc[ROWS][COLS];                                                         \
        for (int r = 0; r < rows; r++)                                                  \
            for (int c = 0; c < COLS; c++) acc[r][c] = (vfloat){0};                     \
        for (long k = 0; k < full; k += LANES) {                                        \
            vfloat wide[COLS];                                                          \
            for (int c = 0; c < COLS; c++) wide[c] = LOAD(w[c] + k);                    \
            for (int r = 0; r < rows; r++) {                                            \
                vfloat row = load_float(x + r * stride + k);                            \
                for (int c = 0; c < COLS; c++) acc[r][c] += row * wide[c];              \
            }                                                                           \
        }                                                                               \
        if (has_tail)                                                                   \
            for (int r = 0; r < rows; r++) {                                            \
                vfloat row = load_float(x + r * stride + full);                         \
                for (int c = 0; c < COLS; c++) acc[r][c] += row * LOAD(tail[c]);        \
            }                                                                           \
        for (int r = 0; r < rows; r++)                                                  \
            for (int c = 0; c < COLS; c++) out[r][c] = total(acc[r][c]);                \
    }

TILE(tile_bf16, uint16_t, load_bf16)
TILE(tile_f32, float, load_float)

#define LINEAR(NAME, TYPE, TILE_OF, STORE, BIAS)                                        \
    void NAME(const float *x, long stride, const TYPE *w, const TYPE *bias, TYPE *y,    \
              long t_count, long n_count, long k_count, int threads) {                  \
        long full = k_count / LANES * LANES;                                            \
        int has_tail = full != k_count;                                                 \
        long tiles = (n_count + COLS - 1) / COLS;                                       \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")               \
        for (long tile = 0; tile < tiles; tile++) {                                     \
            const TYPE *row[COLS];                                                      \
            TYPE tail[COLS][LANES];                                                     \
            float out[ROWS][COLS];                                                      \
            long n0 = tile * COLS;                                                      \
            int cols = n_count - n0 < COLS ? (int)(n_count - n0) : COLS;                \
            for (int c = 0; c < COLS; c++) {                                            \
                row[c] = w + (n0 + (c < cols ? c : cols - 1)) * k_count;                \
                if (has_tail) {                                                         \
                    memset(tail[c], 0, sizeof tail[c]);                                 \
                    memcpy(tail[c], row[c] + full, (k_count - full) * sizeof(TYPE));    \
                }                                                                       \
            }                                                                           \
            for (long t = 0; t < t_count; t += ROWS) {                                  \
                const float *xs = x + t * stride;                                       \
                int rows = t_count - t < ROWS ? (int)(t_count - t) : ROWS;              \
                switch (rows) {                                                         \
                case 1: TILE_OF(xs, stride, row, tail, full, has_tail, 1, out); break;  \
                case 2: TILE_OF(xs, stride, row, tail, full, has_tail, 2, out); break;  \
                case 3: TILE_OF(xs, stride, row, tail, full, has_tail, 3, out); break;  \
                default: TILE_OF(xs, stride, row, tail, full, has_tail, 4, out);        \
                }                                                                       \
                for (int r = 0; r < rows; r++)                                          \
                    for (int c = 0; c < cols; c++)                                      \
                        y[(t + r) * n_count + n0 + c] =                                 \
                            STORE(out[r][c] + (bias ? BIAS(bias[n0 + c]) : 0.0f));      \
            }                                                                           \
        }                                                                               \
    }

#define SAME(v) (v)

LINEAR(linear_bf16, uint16_t, tile_bf16, narrow, widen)
LINEAR(linear_f32, float, tile_f32, SAME, SAME)

/* Rows of x as zero-padded float rows of `stride`. */
void widen_rows(const uint16_t *x, float *out, long t_count, long k_count, long stride) {
    for (long t = 0; t < t_count; t++) {
        for (long k = 0; k < k_count; k++) out[t * stride + k] = widen(x[t * k_count + k]);
        for (long k = k_count; k < stride; k++) out[t * stride + k] = 0.0f;
    }
}

int lanes(void) { return LANES; }
