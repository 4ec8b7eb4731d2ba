#include <stdint.h>

#define MOST_KEPT 64 /* largest values of a row */

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
