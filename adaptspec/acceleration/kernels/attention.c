/* out[t, h] = sum_j softmax_j(scale * q[h, t] . k[g, j]) v[g, j] for few rows t, over the
 * keys j that each row sees; `each` heads h in a row share the keys and values g.
 *
 * A row's keys are counted by their place among those it sees, and every sum runs over that
 * count. So a row's bits depend neither on other rows nor on where its keys lie in the cache,
 * as long as their order stays.
 */
#include "vectors.h"

#define HEADS 4 /* that share a key's load */
#define KEYS (16 / HEADS)
#define VALUES (4 * LANES) /* numbers of a value that are summed at once */

/* For each of `rows` which of `length` keys a mask lets it see: 0 (or true) means to see,
 * anything below half of the type's least not to. Returns 0 if there is anything else. */
#define DEFINE_SEEN(NAME, TYPE, SEES, HIDES)                                            \
    int NAME(const TYPE *mask, long stride, long rows, long length, int32_t *seen,      \
             int32_t *counts) {                                                         \
        for (long t = 0; t < rows; t++) {                                               \
            int32_t count = 0;                                                          \
            for (long j = 0; j < length; j++) {                                         \
                TYPE value = mask[t * stride + j];                                      \
                if (SEES(value)) seen[t * length + count++] = (int32_t)j;               \
                else if (!(HIDES(value))) return 0;                                     \
            }                                                                           \
            if (count == 0) return 0;                                                   \
            counts[t] = count;                                                          \
        }                                                                               \
        return 1;                                                                       \
    }

#define ZERO_BF16(v) (((v) & 0x7fffu) == 0)
#define LEAST_BF16(v) (widen(v) < -1e38f)
#define ZERO_F32(v) ((v) == 0.0f)
#define LEAST_F32(v) ((v) < -1e38f)
#define TRUE_BYTE(v) ((v) != 0)
#define FALSE_BYTE(v) ((v) == 0)

DEFINE_SEEN(seen_bf16, uint16_t, ZERO_BF16, LEAST_BF16)
DEFINE_SEEN(seen_f32, float, ZERO_F32, LEAST_F32)
DEFINE_SEEN(seen_bool, uint8_t, TRUE_BYTE, FALSE_BYTE)

static inline vword some_words(const void *from, long bytes) {
    vword v = {0};
    memcpy(&v, from, bytes);
    return v;
}

/* Products of `heads` queries with `keys` keys: sums[h * KEYS + j]. */
#define DEFINE_ATTEND(KIND, NAME, TYPE, NUMBERS, STORE)                                 \
    static inline __attribute__((always_inline)) void NAME##_products(                  \
        const KIND##_X *q, long stride, const TYPE *const *k, long size, int heads,     \
        float *sums) {                                                                  \
        vfloat acc[HEADS * KEYS];                                                       \
        UNROLLED for (int i = 0; i < HEADS * KEYS; i++) acc[i] = (vfloat){0};           \
        long whole = size / KIND##_STEP * KIND##_STEP;                                  \
        for (long d = 0; d < size; d += KIND##_STEP) {                                  \
            vword word[KEYS];                                                           \
            UNROLLED for (int j = 0; j < KEYS; j++)                                     \
                word[j] = d < whole ? load_words(k[j] + d)                              \
                                    : some_words(k[j] + d, (size - d) * sizeof(TYPE));  \
            UNROLLED for (int h = 0; h < heads; h++)                                    \
                UNROLLED for (int half = 0; half < KIND##_HALVES; half++)               \
                    UNROLLED for (int j = 0; j < KEYS; j++)                             \
                        acc[h * KEYS + j] =                                             \
                            KIND##_ADD(acc[h * KEYS + j],                               \
                                       q + h * stride + d + half * LANES,               \
                                       KIND##_HALF(word[j], half));                     \
        }                                                                               \
        totals(acc, HEADS * KEYS, sums);                                                \
    }                                                                                   \
    /* Values weighted by p[h, j], summed: out[h, size], size <= VALUES. */             \
    static inline __attribute__((always_inline)) void NAME##_values(                    \
        const float *p, long most, const TYPE *v, long v_row, const int32_t *seen,      \
        long count, long size, int whole, int heads, float *out) {                      \
        vfloat acc[HEADS * 4];                                                          \
        UNROLLED for (int i = 0; i < heads * 4; i++) acc[i] = (vfloat){0};              \
        for (long j = 0; j < count; j++) {                                              \
            const TYPE *row = v + (seen ? seen[j] : j) * v_row;                         \
            vfloat value[4];                                                            \
            UNROLLED for (int i = 0; i < 4; i++)                                        \
                value[i] = NUMBERS(row + i * LANES, whole ? LANES : size - i * LANES);  \
            UNROLLED for (int h = 0; h < heads; h++)                                    \
                UNROLLED for (int i = 0; i < 4; i++)                                    \
                    acc[h * 4 + i] += p[h * most + j] * value[i];                       \
        }                                                                               \
        UNROLLED for (int i = 0; i < heads * 4; i++)                                    \
            memcpy(out + i * LANES, &acc[i], sizeof(vfloat));                           \
    }                                                                                   \
    static inline __attribute__((always_inline)) void NAME##_row(                       \
        const KIND##_X *q, long stride, const TYPE *k, long k_row, const TYPE *v,       \
        long v_row, TYPE *out, const int32_t *seen, long count, long most, long size,   \
        long v_size, float scale, int heads, float *p) {                                \
        float sums[16], total_of[HEADS];                                                \
        for (long j = 0; j < count; j += KEYS) {                                        \
            const TYPE *key[KEYS];                                                      \
            for (long i = 0; i < KEYS; i++) {                                           \
                long at = j + i < count ? j + i : count - 1;                            \
                key[i] = k + (seen ? seen[at] : at) * k_row;                            \
            }                                                                           \
            NAME##_products(q, stride, key, size, heads, sums);                         \
            for (int h = 0; h < heads; h++)                                             \
                for (long i = 0; i < KEYS; i++)                                         \
                    if (j + i < count) p[h * most + j + i] = sums[h * KEYS + i] * scale;\
        }                                                                               \
        for (int h = 0; h < heads; h++) {                                               \
            float *ph = p + h * most, high = ph[0];                                     \
            for (long j = 1; j < count; j++) high = ph[j] > high ? ph[j] : high;        \
            vfloat all = {0};                                                           \
            for (long j = 0; j < count; j += LANES) {                                   \
                vfloat x = numbers_f32(ph + j, count - j);                              \
                vfloat e = exponential(x - high);                                       \
                for (int i = 0; i < LANES; i++)                                         \
                    if (j + i < count) ph[j + i] = e[i];                                \
                    else e[i] = 0.0f;                                                   \
                all += e;                                                               \
            }                                                                           \
            total_of[h] = total(all);                                                   \
        }                                                                               \
        for (long d = 0; d < v_size; d += VALUES) {                                     \
            float sum[HEADS * VALUES];                                                  \
            long here = v_size - d < VALUES ? v_size - d : VALUES;                      \
            if (here == VALUES)                                                         \
                NAME##_values(p, most, v + d, v_row, seen, count, here, 1, heads, sum); \
            else                                                                        \
                NAME##_values(p, most, v + d, v_row, seen, count, here, 0, heads, sum); \
            for (int h = 0; h < heads; h++)                                             \
                for (long i = 0; i < here; i++)                                         \
                    out[h * v_size + d + i] = STORE(sum[h * VALUES + i] / total_of[h]); \
        }                                                                               \
    }                                                                                   \
    /* q: [rows, heads, q_size] as the products read it, filled up with zeros to q_size;\
     * k and v: [heads / each, keys, ...] by their strides; out: [rows, heads, v_size]; \
     * seen: [rows, most], of which `counts` are the row's keys, or null: all `most`.   \
     * NAME_part is a thread's share, inside a parallel region. */                      \
    void NAME##_part(const void *queries, long q_size, const void *keys_at,             \
                     long k_head, long k_row, const void *values_at, long v_head,       \
                     long v_row, void *outs, const int32_t *seen,                       \
                     const int32_t *counts, long most, long rows, long heads,           \
                     long each, long size, long v_size, float scale) {                  \
        const KIND##_X *q = queries;                                                    \
        const TYPE *k = keys_at, *v = values_at;                                        \
        TYPE *out = outs;                                                               \
        long parts = (each + HEADS - 1) / HEADS; /* of nearly as many heads each */     \
        long tasks = rows * (heads / each) * parts;                                     \
        float *p = malloc(HEADS * (most + LANES) * sizeof(float));                      \
        _Pragma("omp for schedule(static)")                                             \
        for (long task = 0; task < tasks; task++) {                                     \
            long group = task / parts / rows, t = task / parts % rows;                  \
            long part = task % parts, h0 = each * part / parts;                         \
            long few = each * (part + 1) / parts - h0, h = group * each + h0;           \
            const KIND##_X *q_at = q + (t * heads + h) * q_size;                        \
            const TYPE *k_at = k + group * k_head, *v_at = v + group * v_head;          \
            TYPE *out_at = out + (t * heads + h) * v_size;                              \
            const int32_t *keys = seen ? seen + t * most : 0;                           \
            long count = counts ? counts[t] : most;                                     \
            switch (few) {                                                              \
            case 1: NAME##_row(q_at, q_size, k_at, k_row, v_at, v_row, out_at, keys,    \
                               count, most, size, v_size, scale, 1, p); break;          \
            case 2: NAME##_row(q_at, q_size, k_at, k_row, v_at, v_row, out_at, keys,    \
                               count, most, size, v_size, scale, 2, p); break;          \
            case 3: NAME##_row(q_at, q_size, k_at, k_row, v_at, v_row, out_at, keys,    \
                               count, most, size, v_size, scale, 3, p); break;          \
            case 4: NAME##_row(q_at, q_size, k_at, k_row, v_at, v_row, out_at, keys,    \
                               count, most, size, v_size, scale, 4, p); break;          \
            }                                                                           \
        }                                                                               \
        free(p);                                                                        \
    }                                                                                   \
    void NAME(const KIND##_X *q, long q_size, const TYPE *k, long k_head, long k_row,   \
              const TYPE *v, long v_head, long v_row, TYPE *out, const int32_t *seen,   \
              const int32_t *counts, long most, long rows, long heads, long each,       \
              long size, long v_size, float scale, int threads) {                       \
        long tasks = rows * (heads / each) * ((each + HEADS - 1) / HEADS);              \
        if (tasks < threads) threads = (int)tasks;                                      \
        _Pragma("omp parallel num_threads(threads)")                                    \
        NAME##_part(q, q_size, k, k_head, k_row, v, v_head, v_row, out, seen, counts,   \
                    most, rows, heads, each, size, v_size, scale);                      \
    }

DEFINE_ATTEND(BF16, attend_bf16, uint16_t, numbers_bf16, narrow)
DEFINE_ATTEND(F32, attend_f32, float, numbers_f32, SAME)
