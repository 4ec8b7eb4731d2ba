/* The most multiplications and additions that a build's instructions do in a second: as
 * many independent sums as its registers hold, and nothing read from memory. */
#include "vectors.h"

#define SUMS (LANES == 16 ? 24 : 12)

#define PEAK(NAME, ADD)                                                                 \
    void NAME(long steps, float *out, int threads) {                                    \
        _Pragma("omp parallel num_threads(threads)") {                                  \
            vfloat sum[SUMS], x = {0}, y = {0};                                         \
            __asm__ volatile("" : "+x"(x), "+x"(y));                                    \
            for (int i = 0; i < SUMS; i++) { /* none known to equal another */          \
                sum[i] = (vfloat){0};                                                   \
                __asm__ volatile("" : "+x"(sum[i]));                                    \
            }                                                                           \
            for (long k = 0; k < steps; k++)                                            \
                _Pragma("GCC unroll 24") for (int i = 0; i < SUMS; i++)                 \
                    sum[i] = ADD(sum[i], x, y);                                         \
            vfloat all = {0};                                                           \
            for (int i = 0; i < SUMS; i++) all += sum[i];                               \
            _Pragma("omp critical") out[0] += total(all);                               \
        }                                                                               \
    }

#define ADD_FLOATS(sum, x, y) ((sum) + (x) * (y))
PEAK(peak_f32, ADD_FLOATS)

#if defined(__AVX512BF16__)
#define ADD_PAIRS(sum, x, y)                                                            \
    (vfloat) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(x), (__m512bh)(y))
PEAK(peak_bf16, ADD_PAIRS)
int per_lane(void) { return 2; }
#else
PEAK(peak_bf16, ADD_FLOATS)
int per_lane(void) { return 1; }
#endif

long per_step(void) { return 2 * SUMS * LANES; }
