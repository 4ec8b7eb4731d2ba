/* Vectors of one register, bfloat16, and sums across lanes: what the kernels share. */
#ifndef ADAPTSPEC_VECTORS_H
#define ADAPTSPEC_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef uint32_t vword __attribute__((vector_size(LANES * 4)));

static inline vfloat load_float(const float *p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline vword load_words(const void *p) {
    vword v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline float widen(uint16_t h) {
    uint32_t w = (uint32_t)h << 16;
    float f;
    memcpy(&f, &w, sizeof f);
    return f;
}

#define SAME(v) (v) /* where floats are neither widened nor narrowed */

static inline uint16_t narrow(float f) {
    uint32_t w;
    memcpy(&w, &f, sizeof w);
    if ((w & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((w >> 16) | 0x40u);
    return (uint16_t)((w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
}

/* Lane i is added to lane i + n/2, until one is left. */
static inline float total(vfloat v) {
    float lane[LANES];
    memcpy(lane, &v, sizeof v);
    for (int n = LANES / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    return lane[0];
}

#if LANES == 16 && (defined(__clang__) || __GNUC__ >= 12)
#define PAIR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define HALVES(a, b)                                                                    \
    (PAIR(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +               \
     PAIR(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define QUARTERS(a, b)                                                                  \
    (PAIR(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +             \
     PAIR(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define EIGHTHS(a, b)                                                                   \
    (PAIR(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +             \
     PAIR(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define SINGLES(a, b)                                                                   \
    (PAIR(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +            \
     PAIR(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
/* The totals of sixteen vectors at once, each summed as total() does. */
static inline void totals(const vfloat *v, int count, float *out) {
    vfloat z = {0}, a[8];
    for (int i = 0; i < 8; i++)
        a[i] = 2 * i < count ? HALVES(v[2 * i], (2 * i + 1 < count ? v[2 * i + 1] : z)) : z;
    for (int i = 0; i < 4; i++) a[i] = QUARTERS(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; i++) a[i] = EIGHTHS(a[2 * i], a[2 * i + 1]);
    a[0] = SINGLES(a[0], a[1]);
    memcpy(out, &a[0], sizeof a[0]);
}
#else
static inline void totals(const vfloat *v, int count, float *out) {
    for (int i = 0; i < count; i++) out[i] = total(v[i]);
}
#endif

typedef uint16_t vhalf __attribute__((vector_size(LANES * 2)));

/* exp(x) for x <= 0 as Cephes computes it: 2^n times a polynomial of what is left. */
static inline vfloat exponential(vfloat x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vword below = (vword)(x < -87.0f);
    x = (vfloat)((below & (vword)(x * 0 - 87.0f)) | (~below & (vword)x));
    vfloat shifted = x * 1.44269504f + magic, n = shifted - magic;
    vfloat r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vword power = ((vword)shifted - 0x4b400000u + 127u) << 23;
    return (vfloat)((vword)(p * (vfloat)power) & ~below);
}

/* LANES numbers at p, or where there are fewer, those and zeros. */
static inline vfloat numbers_f32(const float *p, long count) {
    if (count >= LANES) return load_float(p);
    vfloat v = {0};
    for (int i = 0; i < count; i++) v[i] = p[i];
    return v;
}
static inline vfloat numbers_bf16(const uint16_t *p, long count) {
    vhalf v = {0};
    if (count >= LANES) memcpy(&v, p, sizeof v);
    else for (int i = 0; i < count; i++) v[i] = p[i];
    return (vfloat)(__builtin_convertvector(v, vword) << 16);
}

#define UNROLLED _Pragma("GCC unroll 16")

/* bfloat16 comes two to a word. Where the processor multiplies pairs of them, x is read as
 * it is; otherwise even elements come first, then odd ones, as in widen_rows. */
#define BF16_STEP (2 * LANES)
#if defined(__AVX512BF16__)
#define BF16_X uint16_t
#define BF16_HALVES 1
#define BF16_HALF(word, h) (word)
#define BF16_ADD(acc, x, word)                                                          \
    (vfloat) _mm512_dpbf16_ps((__m512)(acc), (__m512bh)load_words(x), (__m512bh)(word))
#else
#define BF16_X float
#define BF16_HALVES 2
#define BF16_HALF(word, h) ((h) ? (word) & 0xffff0000u : (word) << 16)
#define BF16_ADD(acc, x, word) ((acc) + load_float(x) * (vfloat)(word))
#endif
#define F32_X float
#define F32_STEP LANES
#define F32_HALVES 1
#define F32_HALF(word, h) (word)
#define F32_ADD(acc, x, word) ((acc) + load_float(x) * (vfloat)(word))

#endif
