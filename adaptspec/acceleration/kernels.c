/* y[t, n] = sum_k x[t, k] * w[n, k] + bias[n] for few rows t and streamed weights w.
 *
 * Weights are read from memory once, whatever the number of rows, ahead of their use, and
 * widened to float in registers. The sum runs over k in chunks, so that the rows of x of a
 * chunk stay in the first-level cache. Every (t, n) is summed in one order that depends on
 * k alone, so a row's result doesn't depend on how many rows there are.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define COLS 4 /* weight rows per tile */
#define ROWS 4 /* activation rows per tile, at most 6 */
#elif defined(__AVX__)
#define LANES 8
#define COLS 2
#define ROWS 6
#else
#define LANES 4
#define COLS 4
#define ROWS 4
#endif

#define GROUP 16 /* weight rows that share a chunk of x */
#define MOST_KEPT 64 /* largest values of a row */
#define CHUNK 512 /* of k: ROWS x CHUNK floats and GROUP x CHUNK weights fit in 48 KiB */

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

#define LINEAR(KIND, NAME, TYPE, TILE_OF, STORE, BIAS)                                  \
    void NAME(const KIND##_X *x, long stride, const TYPE *w, const TYPE *bias, TYPE *y, \
              long t_count, long n_count, long k_count, int threads) {                  \
        long full = k_count / KIND##_STEP * KIND##_STEP;                                \
        long tiles = (t_count + ROWS - 1) / ROWS; /* of nearly as many rows each */     \
        long groups = (n_count + GROUP - 1) / GROUP;                                    \
        _Pragma("omp parallel num_threads(threads)") {                                  \
            float *sums = malloc(t_count * GROUP * sizeof(float));                      \
            _Pragma("omp for schedule(static)")                                         \
            for (long group = 0; group < groups; group++) {                             \
                long n0 = group * GROUP;                                                \
                long cols = n_count - n0 < GROUP ? n_count - n0 : GROUP;                \
                memset(sums, 0, t_count * GROUP * sizeof(float));                       \
                for (long k0 = 0; k0 < full; k0 += CHUNK) {                             \
                    long count = full - k0 < CHUNK ? full - k0 : CHUNK;                 \
                    long next = k0 + CHUNK < full ? CHUNK : GROUP * k_count - k0;       \
                    for (long t = 0, tile = tiles, rows; tile > 0; tile--, t += rows) { \
                        rows = (t_count - t + tile - 1) / tile;                         \
                        for (long c0 = 0; c0 < cols; c0 += COLS) {                      \
                            const TYPE *row[COLS];                                      \
                            const char *ahead[COLS];                                    \
                            for (int c = 0; c < COLS; c++) {                            \
                                long n = c0 + c < cols ? c0 + c : cols - 1;             \
                                row[c] = w + (n0 + n) * k_count + k0;                   \
                                ahead[c] = (const char *)(row[c] + next);               \
                            }                                                           \
                            TILE_OF##_rows(x + t * stride + k0, stride, row,            \
                                           t ? 0 : ahead, count, (int)rows,             \
                                           sums + t * GROUP + c0, GROUP);               \
                        }                                                               \
                    }                                                                   \
                }                                                                       \
                if (full != k_count) {                                                  \
                    for (long c0 = 0; c0 < cols; c0 += COLS) {                          \
                        TYPE tail[COLS][KIND##_STEP];                                   \
                        const TYPE *row[COLS];                                          \
                        memset(tail, 0, sizeof tail);                                   \
                        for (int c = 0; c < COLS; c++) {                                \
                            long n = c0 + c < cols ? c0 + c : cols - 1;                 \
                            memcpy(tail[c], w + (n0 + n) * k_count + full,              \
                                   (k_count - full) * sizeof(TYPE));                    \
                            row[c] = tail[c];                                           \
                        }                                                               \
                        for (long t = 0, tile = tiles, rows; tile > 0; tile--, t += rows) {\
                            rows = (t_count - t + tile - 1) / tile;                     \
                            TILE_OF##_rows(x + t * stride + full, stride, row, 0,       \
                                           KIND##_STEP, (int)rows,                      \
                                           sums + t * GROUP + c0,                       \
                                           GROUP);                                      \
                        }                                                               \
                    }                                                                   \
                }                                                                       \
                for (long t = 0; t < t_count; t++)                                      \
                    for (long c = 0; c < cols; c++) {                                   \
                        float sum = sums[t * GROUP + c];                                \
                        if (bias) sum += BIAS(bias[n0 + c]);                            \
                        y[t * n_count + n0 + c] = STORE(sum);                           \
                    }                                                                   \
            }                                                                           \
            free(sums);                                                                 \
        }                                                                               \
    }

#define SAME(v) (v)

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

/* The largest of each row, largest first, the first of equals first. Values are compared as
 * integers of the same order (0 and -0 equal; a NaN is beyond infinity on its side). A block
 * is looked into only where its maximum is above the least that is kept.
 */
#define BLOCK 128

static void keep(int32_t *keys, int64_t *places, long *kept, long count, int32_t key, long at) {
    long end = *kept < count ? (*kept)++ : count - 1;
    for (; end > 0 && keys[end - 1] < key; end--) {
        keys[end] = keys[end - 1];
        places[end] = places[end - 1];
    }
    keys[end] = key;
    places[end] = at;
}

#define DEFINE_LARGEST(NAME, WORD, SIGN, LEAST)                                               \
    static inline WORD NAME##_key(WORD x) {                                                   \
        WORD negative = (WORD)(x >> SIGN);                                                    \
        return (WORD)(((x & (WORD)~LEAST) ^ negative) - negative);                            \
    }                                                                                         \
                                                                                              \
    static void NAME##_row(const WORD *row, long columns, long count, int64_t *places) {      \
        int32_t keys[MOST_KEPT];                                                              \
        long kept = 0;                                                                        \
        for (long from = 0; from < columns; from += BLOCK) {                                  \
            long to = columns - from < BLOCK ? columns : from + BLOCK;                        \
            if (kept == count) {                                                              \
                WORD most = LEAST;                                                            \
                for (long i = from; i < to; i++) {                                            \
                    WORD key = NAME##_key(row[i]);                                            \
                    most = key > most ? key : most;                                           \
                }                                                                             \
                if (most <= keys[count - 1]) continue;                                        \
            }                                                                                 \
            for (long i = from; i < to; i++) {                                                \
                WORD key = NAME##_key(row[i]);                                                \
                if (kept < count || key > keys[count - 1])                                    \
                    keep(keys, places, &kept, count, key, i);                                 \
            }                                                                                 \
        }                                                                                     \
    }                                                                                         \
                                                                                              \
    void NAME(const WORD *x, long rows, long columns, long stride, long count,                \
              int64_t *places, int threads) {                                                 \
        if (rows < threads) threads = rows > 0 ? (int)rows : 1;                               \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")                     \
        for (long r = 0; r < rows; r++)                                                       \
            NAME##_row(x + r * stride, columns, count, places + r * count);                   \
    }

DEFINE_LARGEST(largest_16, int16_t, 15, INT16_MIN)
DEFINE_LARGEST(largest_32, int32_t, 31, INT32_MIN)

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
/* Matrix units. Sixteen weight rows are one operand as they lie in memory, nothing packed;
 * up to sixteen rows of x, as pairs of neighbours in k, are the other. Both operands have
 * room for 32 of k. So sixteen rows cost what one does: reading the weights. As above,
 * the order of every sum depends on k alone. */
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16 /* rows of a tile */
#define DEPTH 32 /* of k in a tile */
#define AHEAD_NARROW 256 /* of k, fetched before their use */
#define AHEAD_WIDE 64    /* less: x takes the first-level cache */

/* Whether the system lets this process use the tiles. */
int tiles(void) {
    const long ask = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, ask, tile_data) == 0;
}

/* Tiles 0 to 3: sums [outs, cols]; 4 and 5: weights [outs, DEPTH]; 6 and 7: x. */
static void configure(int outs, int cols) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t height[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.height[i] = (uint8_t)(i < 6 ? outs : DEPTH / 2);
        config.bytes[i] = (uint16_t)(i == 4 || i == 5 ? DEPTH * 2 : cols * 4);
    }
    _tile_loadconfig(&config);
}

/* Pairs `first` to `end` of every block of `cols` rows of x: [blocks, pairs, cols]. */
static void pair_rows(const uint16_t *x, uint32_t *out, long t_count, long k_count,
                      long pairs, long cols, long first, long end) {
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i from = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)(2 * k_count)));
    __mmask16 stored = (__mmask16)((1u << cols) - 1);
    for (long t = 0; t < t_count; t += cols, out += pairs * cols) {
        long here = t_count - t < cols ? t_count - t : cols;
        __mmask16 read = (__mmask16)((1u << here) - 1);
        const uint16_t *row = x + t * k_count;
        for (long k = first; k < end; k++) {
            __m512i pair = _mm512_setzero_si512();
            if (2 * k + 1 < k_count) {
                pair = _mm512_mask_i32gather_epi32(pair, read, from, row + 2 * k, 1);
            } else if (2 * k < k_count) {
                uint32_t last[SIDE] = {0};
                for (long i = 0; i < here; i++) last[i] = row[i * k_count + 2 * k];
                memcpy(&pair, last, sizeof pair);
            }
            _mm512_mask_storeu_epi32(out + k * cols, stored, pair);
        }
    }
}

/* Sums [outs, cols] as rows of y. */
static void put(const float *sums, long cols, const uint16_t *bias, uint16_t *y,
                long n_count, long rows, int outs) {
    __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i from = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)cols));
    __mmask16 used = (__mmask16)((1u << outs) - 1);
    __m512 added = _mm512_setzero_ps();
    if (bias) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(used, bias));
        added = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    for (long t = 0; t < rows; t++) {
        __m512 v = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), used, from, sums + t, 4);
        __m256bh narrowed = _mm512_cvtneps_pbh(_mm512_add_ps(v, added));
        _mm256_mask_storeu_epi16(y + t * n_count, used, (__m256i)narrowed);
    }
}

/* One or two blocks of weight rows (`w_blocks`) by one or two of x into sums [w block,
 * x block, SIDE, cols]. `tail` [w block, SIDE, DEPTH] holds what is left of k. */
static void product(const uint16_t *w, long k_count, const uint16_t *tail, const uint32_t *x,
                    const uint32_t *x2, long cols, long distance, int w_blocks, float *sums) {
    long full = k_count / DEPTH * DEPTH, stride = k_count * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < k_count; k += DEPTH) {
        int inside = k < full;
        const uint16_t *from = inside ? w + k : tail;
        long from_stride = inside ? stride : DEPTH * 2;
        long ahead = k + distance;
        if (ahead >= full) ahead += w_blocks * SIDE * k_count - full; /* the next rows */
        for (int i = 0; inside && i < w_blocks * SIDE; i++)
            __builtin_prefetch(w + ahead + i * k_count);
        const uint32_t *here = x + k / 2 * cols, *here2 = x2 ? x2 + k / 2 * cols : 0;
        for (long i = 0; i < cols; i++) { /* sixteen words to a line */
            __builtin_prefetch(here + DEPTH / 2 * cols + i * 16);
            if (x2) __builtin_prefetch(here2 + DEPTH / 2 * cols + i * 16);
        }
        _tile_loadd(6, here, cols * 4);
        _tile_loadd(4, from, from_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (x2) {
            _tile_loadd(7, here2, cols * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (w_blocks > 1) {
            _tile_loadd(5, inside ? from + SIDE * k_count : tail + SIDE * DEPTH, from_stride);
            _tile_dpbf16ps(2, 5, 6);
            if (x2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, cols * 4);
    if (x2) _tile_stored(1, sums + SIDE * cols, cols * 4);
    if (w_blocks > 1) _tile_stored(2, sums + 2 * SIDE * cols, cols * 4);
    if (w_blocks > 1 && x2) _tile_stored(3, sums + 3 * SIDE * cols, cols * 4);
}

/* As linear_bf16, of x as it is; `pairs` has room for x, each row filled up to a multiple
 * of DEPTH, more than SIDE rows to a multiple of SIDE. */
void linear_tiles(const uint16_t *x, uint32_t *pairs, const uint16_t *w, const uint16_t *bias,
                  uint16_t *y, long t_count, long n_count, long k_count, int threads) {
    long cols = t_count < SIDE ? t_count : SIDE, full = k_count / DEPTH * DEPTH;
    long steps = (k_count + DEPTH - 1) / DEPTH, block = steps * (DEPTH / 2) * cols;
    int wide = t_count > SIDE;
    long group = wide ? 2 * SIDE : SIDE, groups = (n_count + group - 1) / group;
    _Pragma("omp parallel num_threads(threads)") {
        float sums[4 * SIDE * SIDE];
        uint16_t tail[2 * SIDE * DEPTH];
        configure(SIDE, (int)cols);
        _Pragma("omp for schedule(static)")
        for (long step = 0; step < steps; step++)
            pair_rows(x, pairs, t_count, k_count, steps * (DEPTH / 2), cols,
                      step * (DEPTH / 2), (step + 1) * (DEPTH / 2));
        _Pragma("omp for schedule(static)")
        for (long g = 0; g < groups; g++) {
            long n0 = g * group, n_end = n0 + group < n_count ? n0 + group : n_count;
            while (n0 < n_end) {
                long left = n_end - n0;
                int w_blocks = wide && left == 2 * SIDE ? 2 : 1;
                int outs = left < SIDE ? (int)left : SIDE;
                const uint16_t *rows = w + n0 * k_count;
                if (full != k_count) {
                    memset(tail, 0, sizeof tail);
                    for (long i = 0; i < w_blocks * SIDE && i < left; i++)
                        memcpy(tail + i * DEPTH, rows + i * k_count + full,
                               (k_count - full) * 2);
                }
                if (outs < SIDE) configure(outs, (int)cols);
                for (long t = 0; t < t_count; t += 2 * SIDE) {
                    const uint32_t *at = pairs + t / SIDE * block;
                    int more = t + SIDE < t_count;
                    product(rows, k_count, tail, at, more ? at + block : 0, cols,
                            wide ? AHEAD_WIDE : AHEAD_NARROW, w_blocks, sums);
                    for (int i = 0; i < w_blocks; i++)
                        for (int j = 0; j <= more; j++) {
                            long t0 = t + j * SIDE, n = n0 + i * SIDE;
                            long here = t_count - t0 < SIDE ? t_count - t0 : SIDE;
                            put(sums + (2 * i + j) * SIDE * cols, cols, bias ? bias + n : 0,
                                y + t0 * n_count + n, n_count, here, outs);
                        }
                }
                if (outs < SIDE) configure(SIDE, (int)cols);
                n0 += w_blocks * SIDE;
            }
        }
        _tile_release();
    }
}
#else
int tiles(void) { return 0; }

void linear_tiles(const uint16_t *x, uint32_t *pairs, const uint16_t *w, const uint16_t *bias,
                  uint16_t *y, long t_count, long n_count, long k_count, int threads) {
    (void)x, (void)pairs, (void)w, (void)bias, (void)y;
    (void)t_count, (void)n_count, (void)k_count, (void)threads;
}
#endif
