#include <stdint.h>
#include <string.h>

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
/* Matrix units. Sixteen weight rows are one operand as they lie in memory, nothing packed;
 * up to sixteen rows of x, as pairs of neighbours in k, are the other. Both operands have
 * room for 32 of k. So sixteen rows cost what one does: reading the weights. As above,
 * the order of every sum depends on k alone. */
#include <immintrin.h>
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
