/* y[T,N] = x[T,K] * w[N,K]^T + bias for few rows T, weights row-major as they are.
 *
 * Sums are kept in float and rounded once. A row's additions come in the same order
 * whatever T is, so a row's result doesn't depend on the rows beside it. Only
 * GOMP_parallel and GOMP_barrier are needed of the OpenMP runtime: torch's is used. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 4 /* 4 x 6 sums + 4 weights + 1 input fit the 32 registers */
#define TOKENS 6
#elif defined(__AVX__)
#define LANES 8
#define ROWS 2
#define TOKENS 4
#else
#define LANES 4
#define ROWS 4
#define TOKENS 4
#endif
#define CHUNK 32 /* tokens per pass over the weights: their inputs stay in L2 */
#define STEAL 8  /* blocks of rows a thread takes at a time */

typedef float vfloat __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vbits __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint16_t bf16;

static inline float widen(bf16 value) {
  uint32_t bits = (uint32_t)value << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static inline bf16 narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0; /* NaN stays NaN */
  return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline __attribute__((always_inline)) vfloat load(
    const void *weights, int64_t at, int half) {
  if (half) {
    vhalf raw = *(const vhalf *)((const bf16 *)weights + at);
    return (vfloat)(__builtin_convertvector(raw, vbits) << 16);
  }
  return *(const vfloat *)((const float *)weights + at);
}

static inline float total(vfloat sum) {
  float part[LANES];
  memcpy(part, &sum, sizeof part);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) part[i] += part[i + width];
  return part[0];
}

/* ROWS rows of weights from `first` against `tokens` (constant where inlined). */
static inline __attribute__((always_inline)) void block(
    const float *x, const void *w, const void *bias, void *y, int64_t first, int64_t n,
    int64_t k, int64_t padded, const int tokens, const int half) {
  const int size = half ? 2 : 4;
  const int64_t whole = k / LANES * LANES;
  const char *row[ROWS];
  vfloat sum[ROWS][TOKENS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    int64_t at = first + r < n ? first + r : n - 1; /* repeats are never stored */
    row[r] = (const char *)w + at * k * size;
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) sum[r][t] = (vfloat){0};
  }
  for (int64_t i = 0; i < whole; i += LANES) {
    vfloat weight[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      __builtin_prefetch(row[r] + i * size + 1024);
      weight[r] = load(row[r], i, half);
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
      vfloat input = *(const vfloat *)(x + t * padded + i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sum[r][t] += weight[r] * input;
    }
  }
  if (whole < k) {
    char tail[LANES * 4];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      memset(tail, 0, sizeof tail);
      memcpy(tail, row[r] + whole * size, (size_t)((k - whole) * size));
      vfloat weight = load(tail, 0, half);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; t++)
        sum[r][t] += weight * *(const vfloat *)(x + t * padded + whole);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    int64_t at = first + r;
    if (at >= n) break;
    float add = 0;
    if (bias) add = half ? widen(((const bf16 *)bias)[at]) : ((const float *)bias)[at];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
      float value = total(sum[r][t]);
      if (bias) value += add;
      if (half)
        ((bf16 *)y)[t * n + at] = narrow(value);
      else
        ((float *)y)[t * n + at] = value;
    }
  }
}

static inline __attribute__((always_inline)) void rows(
    const float *x, const void *w, const void *bias, void *y, int64_t first, int64_t n,
    int64_t k, int64_t padded, int64_t count, const int half) {
  int64_t parts = (count + TOKENS - 1) / TOKENS;
  int64_t at = 0;
  for (int64_t part = 0; part < parts; part++) {
    int64_t tokens = (count - at + parts - part - 1) / (parts - part);
    const float *in = x + at * padded;
    void *out = (char *)y + at * n * (half ? 2 : 4);
#define CASE(t)                                                \
  case t:                                                      \
    block(in, w, bias, out, first, n, k, padded, t, half);     \
    break;
    switch (tokens) {
      CASE(1) CASE(2) CASE(3) CASE(4)
#if TOKENS > 4
      CASE(5) CASE(6)
#endif
    }
#undef CASE
    at += tokens;
  }
}

static __attribute__((noinline)) void rows_bf16(
    const float *x, const void *w, const void *bias, void *y, int64_t first, int64_t n,
    int64_t k, int64_t padded, int64_t count) {
  rows(x, w, bias, y, first, n, k, padded, count, 1);
}

static __attribute__((noinline)) void rows_float(
    const float *x, const void *w, const void *bias, void *y, int64_t first, int64_t n,
    int64_t k, int64_t padded, int64_t count) {
  rows(x, w, bias, y, first, n, k, padded, count, 0);
}

/* Grown, kept between calls: fresh pages for every call would cost more than the copy. */
static _Thread_local float *scratch;
static _Thread_local size_t scratch_bytes;

/* x: T rows `stride` elements apart. Returns 0, or 1 without memory. */
int adaptspec_linear(const void *x, int64_t stride, const void *w, const void *bias,
                     void *y, int64_t t, int64_t n, int64_t k, int half, int threads) {
  const int64_t padded = (k + LANES - 1) / LANES * LANES;
  const size_t needed = (size_t)(t * padded) * sizeof(float);
  if (needed > scratch_bytes) {
    free(scratch);
    scratch_bytes = 0;
    if (posix_memalign((void **)&scratch, 64, needed)) return scratch = NULL, 1;
    scratch_bytes = needed;
  }
  float *inputs = scratch;
  const int64_t blocks = (n + ROWS - 1) / ROWS;
  const int64_t chunks = (t + CHUNK - 1) / CHUNK;
  int64_t next[64] = {0}; /* one ticket counter per chunk */
  if (chunks > 64) return 1;
#pragma omp parallel num_threads(threads)
  {
    int me = 0, team = 1;
#ifdef _OPENMP
    me = omp_get_thread_num();
    team = omp_get_num_threads();
#endif
    for (int64_t i = me; i < t; i += team) {
      float *out = inputs + i * padded;
      if (half)
        for (int64_t j = 0; j < k; j++)
          out[j] = widen(((const bf16 *)x)[i * stride + j]);
      else
        memcpy(out, (const float *)x + i * stride, (size_t)k * sizeof(float));
      for (int64_t j = k; j < padded; j++) out[j] = 0;
    }
#pragma omp barrier
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      int64_t from = chunk * CHUNK;
      int64_t count = t - from < CHUNK ? t - from : CHUNK;
      const float *in = inputs + from * padded;
      char *out = (char *)y + from * n * (half ? 2 : 4);
      for (;;) {
        int64_t start = __atomic_fetch_add(&next[chunk], STEAL, __ATOMIC_RELAXED);
        if (start >= blocks) break;
        for (int64_t b = start; b < start + STEAL && b < blocks; b++) {
          if (half)
            rows_bf16(in, w, bias, out, b * ROWS, n, k, padded, count);
          else
            rows_float(in, w, bias, out, b * ROWS, n, k, padded, count);
        }
      }
    }
  }
  return 0;
}
