/* y[t, n] = sum_k x[t, k] * w[n, k] + bias[n], of weights packed once for reading.
 *
 * A packed weight is a row of blocks of COLS outputs, more for a type that needs them. A
 * block holds, for each word of k in order, that word of all its outputs side by side; a
 * word is one float, or two neighbours of bfloat16. So each thread reads one contiguous
 * stream, fetched ahead; a word of x is broadcast to all lanes; and no sum across lanes is
 * left.
 *
 * Every (t, n) is summed over k in order, in one accumulator, so a row's bits don't depend
 * on how many rows there are.
 */
#include "vectors.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

/* A tile is ROWS of x by VECTORS of outputs, whose sums are kept in registers, of which AVX2
 * has sixteen. Each sum waits for its last addition, twice a word where bfloat16 is widened:
 * one row then needs four vectors, so that memory decides and not those waits. */
#if LANES == 16
#define ROWS_BF16 12
#define VECTORS_BF16 2
#define ROWS_F32 12
#else
#define ROWS_BF16 2
#define VECTORS_BF16 4
#define ROWS_F32 6
#endif
#define VECTORS_F32 2
#define MOST_ROWS 12

/* In a function of one KIND: vectors and outputs of a block. */
#define BLOCK_OF(KIND) \
    enum { VECTORS = VECTORS_##KIND, COLS = VECTORS * LANES }
#define AHEAD 4096 /* bytes of the stream that are fetched before their use */
#define CHUNK 128  /* words of k: 16 KiB of a block and as much of the rows of x stay in the
                    * first-level cache for all tiles of rows, of which those after the
                    * first fetch the next chunk */

/* A vector of words of w is multiplied by a word of x, in HALVES one after the other, and
 * added to a vector of sums. */
#if defined(__AVX512BF16__)
#define X_BF16 int32_t
#define HALVES_BF16 1
#define ADD_BF16(sum, word, h, x)                                                       \
    (vfloat) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(word),                          \
                              (__m512bh)_mm512_set1_epi32(*(x)))
#else
#define X_BF16 float
#define HALVES_BF16 2
#define ADD_BF16(sum, word, h, x)                                                       \
    ((sum) + (vfloat)((h) ? (word) & 0xffff0000u : (word) << 16) * *(x))
#endif
#define X_F32 float
#define HALVES_F32 1
#define ADD_F32(sum, word, h, x) ((sum) + (vfloat)(word) * *(x))

#define TILE(KIND, NAME)                                                                \
    static inline __attribute__((always_inline)) void NAME(                             \
        const uint32_t *w, const X_##KIND *x, long stride, long words, int rows,        \
        int begin, float *sums, long ahead) {                                           \
        BLOCK_OF(KIND);                                                                 \
        vfloat sum[MOST_ROWS * VECTORS];                                                \
        UNROLLED for (int i = 0; i < rows * VECTORS; i++) {                             \
            if (begin) sum[i] = (vfloat){0};                                            \
            else memcpy(&sum[i], sums + i * LANES, sizeof(vfloat));                     \
        }                                                                               \
        for (long k = 0; k < words; k++) {                                              \
            vword word[VECTORS];                                                        \
            UNROLLED for (int c = 0; c < VECTORS; c++)                                  \
                __builtin_prefetch((const char *)(w + k * COLS + c * LANES) + ahead);   \
            UNROLLED for (int h = 0; h < HALVES_##KIND; h++) {                          \
                UNROLLED for (int c = 0; c < VECTORS; c++)                              \
                    memcpy(&word[c], w + k * COLS + c * LANES, sizeof(vword));          \
                UNROLLED for (int r = 0; r < rows; r++)                                 \
                    UNROLLED for (int c = 0; c < VECTORS; c++)                          \
                        sum[r * VECTORS + c] =                                          \
                            ADD_##KIND(sum[r * VECTORS + c], word[c], h,                \
                                       x + r * stride + k * HALVES_##KIND + h);         \
            }                                                                           \
        }                                                                               \
        UNROLLED for (int i = 0; i < rows * VECTORS; i++)                               \
            memcpy(sums + i * LANES, &sum[i], sizeof(vfloat));                          \
    }                                                                                   \
    static __attribute__((noinline)) void NAME##_rows(                                  \
        const uint32_t *w, const X_##KIND *x, long stride, long words, int rows,        \
        int begin, float *sums, long ahead) {                                           \
        switch (rows) {                                                                 \
        case 1: NAME(w, x, stride, words, 1, begin, sums, ahead); break;                \
        case 2: NAME(w, x, stride, words, 2, begin, sums, ahead); break;                \
        case 3: NAME(w, x, stride, words, 3, begin, sums, ahead); break;                \
        case 4: NAME(w, x, stride, words, 4, begin, sums, ahead); break;                \
        case 5: NAME(w, x, stride, words, 5, begin, sums, ahead); break;                \
        case 6: NAME(w, x, stride, words, 6, begin, sums, ahead); break;                \
        MORE_ROWS(NAME)                                                                 \
        }                                                                               \
    }

#if LANES == 16
#define MORE_ROWS(NAME)                                                                 \
    case 7: NAME(w, x, stride, words, 7, begin, sums, ahead); break;                    \
    case 8: NAME(w, x, stride, words, 8, begin, sums, ahead); break;                    \
    case 9: NAME(w, x, stride, words, 9, begin, sums, ahead); break;                    \
    case 10: NAME(w, x, stride, words, 10, begin, sums, ahead); break;                  \
    case 11: NAME(w, x, stride, words, 11, begin, sums, ahead); break;                  \
    case 12: NAME(w, x, stride, words, 12, begin, sums, ahead); break;
#else
#define MORE_ROWS(NAME)
#endif

TILE(BF16, tile_bf16)
TILE(F32, tile_f32)

/* `words` of k per row of w; x is [t_count, words * HALVES], what is beyond k zero; rows of
 * y are y_row apart. NAME_part is a thread's share, inside a parallel region; it doesn't
 * wait for the others. */
#define PACKED(KIND, NAME, TYPE, TILE_OF, STORE, BIAS)                                  \
    void NAME##_part(const void *x_rows, const uint32_t *w, const void *biases,         \
                     void *y_rows, long y_row, long t_count, long n_count,              \
                     long words) {                                                      \
        BLOCK_OF(KIND);                                                                 \
        const X_##KIND *x = x_rows;                                                     \
        const TYPE *bias = biases;                                                      \
        TYPE *y = y_rows;                                                               \
        long tiles = (t_count + ROWS_##KIND - 1) / ROWS_##KIND; /* of as many rows */   \
        long blocks = (n_count + COLS - 1) / COLS, stride = words * HALVES_##KIND;      \
        long step = tiles > 1 ? CHUNK : words;                                          \
        float *sums = malloc(t_count * COLS * sizeof(float));                           \
        _Pragma("omp for schedule(static) nowait")                                      \
        for (long block = 0; block < blocks; block++) {                                 \
            const uint32_t *from = w + block * words * COLS;                            \
            for (long k = 0; k < words; k += step) {                                    \
                long count = words - k < step ? words - k : step;                       \
                for (long t = 0, tile = tiles, rows; tile > 0; tile--, t += rows) {     \
                    rows = (t_count - t + tile - 1) / tile;                             \
                    TILE_OF##_rows(from + k * COLS,                                     \
                                   x + t * stride + k * HALVES_##KIND, stride, count,   \
                                   (int)rows, k == 0, sums + t * COLS,                  \
                                   t ? step * COLS * 4 : AHEAD);                        \
                }                                                                       \
            }                                                                           \
            long n0 = block * COLS;                                                     \
            long cols = n_count - n0 < COLS ? n_count - n0 : COLS;                      \
            for (long t = 0; t < t_count; t++)                                          \
                for (long c = 0; c < cols; c++) {                                       \
                    float sum = sums[t * COLS + c];                                     \
                    if (bias) sum += BIAS(bias[n0 + c]);                                \
                    y[t * y_row + n0 + c] = STORE(sum);                                 \
                }                                                                       \
        }                                                                               \
        free(sums);                                                                     \
    }                                                                                   \
    void NAME(const X_##KIND *x, const uint32_t *w, const TYPE *bias, TYPE *y,          \
              long t_count, long n_count, long words, int threads) {                    \
        _Pragma("omp parallel num_threads(threads)")                                    \
        NAME##_part(x, w, bias, y, n_count, t_count, n_count, words);                   \
    }

PACKED(BF16, packed_bf16, uint16_t, tile_bf16, narrow, widen)
PACKED(F32, packed_f32, float, tile_f32, SAME, SAME)

/* Between a plain weight [n_count, k_count] and a packed one; `per` elements to a word. */
#define REPACK(KIND, NAME, TYPE)                                                        \
    void pack_##NAME(const TYPE *plain, TYPE *packed, long n_count, long k_count,       \
                     int threads) {                                                     \
        BLOCK_OF(KIND);                                                                 \
        const long per = sizeof(uint32_t) / sizeof(TYPE);                               \
        long words = (k_count + per - 1) / per, blocks = (n_count + COLS - 1) / COLS;   \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")               \
        for (long block = 0; block < blocks; block++)                                   \
            for (long k0 = 0; k0 < words; k0 += 64)                                     \
                for (long c = 0; c < COLS; c++) {                                       \
                    long n = block * COLS + c;                                          \
                    const TYPE *row = plain + n * k_count;                              \
                    for (long k = k0; k < words && k < k0 + 64; k++)                    \
                        for (long i = 0; i < per; i++) {                                \
                            TYPE v = n < n_count && k * per + i < k_count               \
                                         ? row[k * per + i] : 0;                        \
                            packed[((block * words + k) * COLS + c) * per + i] = v;     \
                        }                                                               \
                }                                                                       \
    }                                                                                   \
    void unpack_##NAME(const TYPE *packed, const int64_t *rows, TYPE *plain,            \
                       long count, long k_count, int threads) {                         \
        BLOCK_OF(KIND);                                                                 \
        const long per = sizeof(uint32_t) / sizeof(TYPE);                               \
        long words = (k_count + per - 1) / per;                                         \
        _Pragma("omp parallel for num_threads(threads) schedule(static)")               \
        for (long r = 0; r < count; r++) {                                              \
            long n = rows ? rows[r] : r;                                                \
            const TYPE *from = packed + (n / COLS * words * COLS + n % COLS) * per;     \
            for (long k = 0; k < k_count; k++)                                          \
                plain[r * k_count + k] = from[k / per * COLS * per + k % per];          \
        }                                                                               \
    }

REPACK(BF16, bf16, uint16_t)
REPACK(F32, f32, uint32_t)

/* What a number of outputs is filled up to: whole blocks, whatever the type. */
int packed_columns(void) {
    const int vectors = VECTORS_BF16 > VECTORS_F32 ? VECTORS_BF16 : VECTORS_F32;
    return vectors * LANES;
}

/* Whether packed_bf16 takes x as it is; otherwise widened to float. */
int packed_pairs(void) { return HALVES_BF16 == 1; }

/* Ask for large pages, of which a stream's addresses need fewer. Only a wish. */
void large_pages(void *start, long bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    madvise(start, (size_t)bytes, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}
