/* A decoder layer for few rows: everything between its products and its attention happens
 * here, in one parallel region.
 *
 * h = x + after_attention(out(attention(turned(queries, keys, values of before_attention(x)))))
 * y = h + after_mlp(down(act(gate(m)) * up(m))), m = before_mlp(h)
 *
 * Each step rounds to the layer's type where the modules do. A row is summed in an order
 * that depends on that row alone.
 */
#include "vectors.h"

struct product {
    const void *weight;
    const void *bias;
    long outer;
};

/* Root mean square normalisation; there is none where the weight is null. */
struct norm {
    const void *weight;
    float epsilon, offset; /* what is added to the weight */
    int early;             /* rounded before the weight is multiplied, and after it */
};

enum { SILU, GELU_TANH, GELU };

struct layer {
    long hidden, heads, groups, head, inner;
    struct norm before_attention, after_attention, before_mlp, after_mlp, query, key;
    struct product into[3], out, gate_up[2], down; /* outer 0: no more */
    float scale;
    int activation, up_first;
    int plain; /* weights are read as they lie, otherwise packed */
};

struct call {
    const void *x;
    void *y;
    const void *cos, *sin; /* [rows, turned]; null: nothing is turned */
    void *keys, *values;   /* [groups, ...] by their strides; new rows go behind `cached` */
    const int32_t *seen, *counts;
    void *room; /* room_BF16 bytes */
    long rows, turned, cached, key_head, value_head;
    int threads;
};

#define SHARE(KIND, TYPE)                                                               \
    void packed_##KIND##_part(const void *x, const uint32_t *w, const void *bias,       \
                              void *y, long y_row, long t_count, long n_count,          \
                              long words);                                              \
    void linear_##KIND##_part(const void *x, long stride, const void *w,                \
                              const void *bias, void *y, long y_row, long t_count,      \
                              long n_count, long k_count);                              \
    void attend_##KIND##_part(const void *q, long q_size, const void *k, long k_head,   \
                              long k_row, const void *v, long v_head, long v_row,       \
                              void *out, const int32_t *seen, const int32_t *counts,    \
                              long most, long rows, long heads, long each, long size,   \
                              long v_size, float scale);
SHARE(bf16, uint16_t)
SHARE(f32, float)

/* Numbers rounded to bfloat16, as narrow() does. */
static inline vfloat rounded_bf16(vfloat v) {
    vword w = (vword)v, nan = (vword)((w & 0x7fffffffu) > 0x7f800000u);
    vword r = (w + 0x7fffu + ((w >> 16) & 1u)) & 0xffff0000u;
    return (vfloat)((nan & (w | 0x400000u)) | (~nan & r));
}
#define rounded_f32(v) (v)

static inline void put_f32(float *p, vfloat v, long count) {
    memcpy(p, &v, (count < LANES ? count : LANES) * sizeof(float));
}
/* Of rounded numbers. */
static inline void put_bf16(uint16_t *p, vfloat v, long count) {
    vhalf h = __builtin_convertvector((vword)v >> 16, vhalf);
    memcpy(p, &h, (count < LANES ? count : LANES) * sizeof(uint16_t));
}

/* What products read: as it is stored, or widened where pairs aren't multiplied. Plain
 * weights then want even numbers first. */
#if defined(__AVX512BF16__)
#define IN_bf16 uint16_t
static inline void put_in_bf16(uint16_t *row, long i, vfloat v, long count, int plain) {
    (void)plain;
    put_bf16(row + i, v, count - i);
}
#define WIDENED_bf16 0
#define READ_bf16 widen
#define WORD_bf16 2
#define PLACE_bf16(d) (d)
#else
#define IN_bf16 float
#define WIDENED_bf16 1
#define READ_bf16 SAME
#define WORD_bf16 2
#define PLACE_bf16(d) ((d) / BF16_STEP * BF16_STEP + (d) % 2 * LANES + (d) % BF16_STEP / 2)
static inline void put_in_bf16(float *row, long i, vfloat v, long count, int plain) {
    if (!plain) put_f32(row + i, v, count - i);
    else for (long d = 0; d < LANES && i + d < count; d++) row[PLACE_bf16(i + d)] = v[d];
}
#endif
#define STEP_bf16 BF16_STEP
#define IN_f32 float
static inline void put_in_f32(float *row, long i, vfloat v, long count, int plain) {
    (void)plain;
    put_f32(row + i, v, count - i);
}
#define WIDENED_f32 0
#define READ_f32 SAME
#define WORD_f32 1
#define PLACE_f32(d) (d)
#define STEP_f32 F32_STEP

#define WHOLE(n, step) (((n) + (step) - 1) / (step) * (step))

/* e^-|x|, then x / (1 + e^-x) without overflow. */
static inline vfloat sigmoid_of(vfloat x) {
    vfloat e = exponential((vfloat)((vword)x | 0x80000000u));
    vword negative = (vword)(x < 0.0f);
    vfloat top = (vfloat)((negative & (vword)e) | (~negative & (vword)(x * 0 + 1.0f)));
    return top / (e + 1.0f);
}
static inline vfloat activated(vfloat x, int kind) {
    if (kind == SILU) return x * sigmoid_of(x);
    if (kind == GELU) {
        for (int i = 0; i < LANES; i++)
            x[i] *= 0.5f * (1.0f + __builtin_erff(0.70710678f * x[i]));
        return x;
    }
    return x * sigmoid_of(1.5957691216f * (x + 0.044715f * x * x * x));
}

#define LAYER(KIND, TYPE)                                                               \
    static void multiply_##KIND(const struct layer *l, const struct product *p,         \
                                const void *x, long count, TYPE *y, long y_row,         \
                                long rows) {                                            \
        if (l->plain)                                                                   \
            linear_##KIND##_part(x, count, p->weight, p->bias, y, y_row, rows,          \
                                 p->outer, count);                                      \
        else                                                                            \
            packed_##KIND##_part(x, p->weight, p->bias, y, y_row, rows, p->outer,       \
                                 count / WORD_##KIND);                                  \
    }                                                                                   \
    /* Of `count` numbers at x; `put` where products read them, or as they are stored. */\
    static inline float scale_of_##KIND(const TYPE *x, long count, float epsilon) {     \
        vfloat squares = {0};                                                           \
        for (long i = 0; i < count; i += LANES) {                                       \
            vfloat v = numbers_##KIND(x + i, count - i);                                \
            squares += v * v;                                                           \
        }                                                                               \
        return 1.0f / __builtin_sqrtf(total(squares) / count + epsilon);                \
    }                                                                                   \
    static inline vfloat normed_##KIND(const struct norm *n, vfloat v, float scale,     \
                                       long i, long count) {                            \
        vfloat weight = numbers_##KIND((const TYPE *)n->weight + i, count - i);         \
        v *= scale;                                                                     \
        if (n->early) v = rounded_##KIND(v);                                            \
        return rounded_##KIND(v * (weight + n->offset));                                \
    }                                                                                   \
    static void norm_in_##KIND(const struct norm *n, const TYPE *x, long count,         \
                               IN_##KIND *to, int plain) {                              \
        float scale = n->weight ? scale_of_##KIND(x, count, n->epsilon) : 0;            \
        for (long i = 0; i < count; i += LANES) {                                       \
            vfloat v = numbers_##KIND(x + i, count - i);                                \
            if (n->weight) v = normed_##KIND(n, v, scale, i, count);                    \
            put_in_##KIND(to, i, v, count, plain);                                      \
        }                                                                               \
    }                                                                                   \
    /* sum = x + norm(y) */                                                             \
    static void add_##KIND(const struct norm *n, const TYPE *x, const TYPE *y,          \
                           long count, TYPE *sum) {                                     \
        float scale = n->weight ? scale_of_##KIND(y, count, n->epsilon) : 0;            \
        for (long i = 0; i < count; i += LANES) {                                       \
            vfloat v = numbers_##KIND(y + i, count - i);                                \
            if (n->weight) v = normed_##KIND(n, v, scale, i, count);                    \
            v += numbers_##KIND(x + i, count - i);                                      \
            put_##KIND(sum + i, rounded_##KIND(v), count - i);                          \
        }                                                                               \
    }                                                                                   \
    /* One head, normed and turned: each number with the one half a turn away. */       \
    static void turn_##KIND(const struct norm *n, const TYPE *x, long count,            \
                            const TYPE *cos, const TYPE *sin, long turned,              \
                            float *to) {                                                \
        float scale = n->weight ? scale_of_##KIND(x, count, n->epsilon) : 0;            \
        for (long i = 0; i < count; i += LANES) {                                       \
            vfloat v = numbers_##KIND(x + i, count - i);                                \
            if (n->weight) v = normed_##KIND(n, v, scale, i, count);                    \
            put_f32(to + i, v, count - i);                                              \
        }                                                                               \
        if (!cos) return;                                                               \
        long half = turned / 2;                                                         \
        for (long i = 0; i < half; i += LANES) {                                        \
            long few = half - i;                                                        \
            vfloat low = numbers_f32(to + i, few), high = numbers_f32(to + half + i, few);\
            vfloat a = rounded_##KIND(low * numbers_##KIND(cos + i, few));              \
            vfloat b = rounded_##KIND(high * numbers_##KIND(sin + i, few));             \
            vfloat c = rounded_##KIND(high * numbers_##KIND(cos + half + i, few));      \
            vfloat d = rounded_##KIND(low * numbers_##KIND(sin + half + i, few));       \
            put_f32(to + i, rounded_##KIND(a - b), few);                                \
            put_f32(to + half + i, rounded_##KIND(c + d), few);                         \
        }                                                                               \
    }                                                                                   \
    /* Where things lie in the room, in bytes; the last is its size. */                 \
    static void places_##KIND(const struct layer *l, long rows, long *at) {             \
        long wide = (l->heads + 2 * l->groups) * l->head;                               \
        long in = l->hidden > l->heads * l->head ? l->hidden : l->heads * l->head;      \
        long sizes[7] = {                                                               \
            in * sizeof(IN_##KIND),                               /* read by products */\
            wide * sizeof(TYPE),                                  /* q, k and v */      \
            l->heads * WHOLE(l->head, STEP_##KIND) * sizeof(IN_##KIND), /* turned */    \
            l->heads * l->head * sizeof(TYPE),                    /* attended */        \
            l->hidden * sizeof(TYPE),                             /* products of it */  \
            l->hidden * sizeof(TYPE),                             /* h */               \
            2 * l->inner * sizeof(TYPE) + l->inner * sizeof(IN_##KIND),                 \
        };                                                                              \
        at[0] = 0;                                                                      \
        for (int i = 0; i < 7; i++) at[i + 1] = at[i] + WHOLE(rows * sizes[i], 64);     \
    }                                                                                   \
    long layer_room_##KIND(const struct layer *l, long rows) {                          \
        long at[8];                                                                     \
        places_##KIND(l, rows, at);                                                     \
        return at[7];                                                                   \
    }                                                                                   \
    /* The turned queries of the call that used this room last: [rows, heads, head]. */\
    void layer_queries_##KIND(const struct layer *l, long rows, const void *room,       \
                              float *to) {                                              \
        long at[8], padded = WHOLE(l->head, STEP_##KIND);                               \
        places_##KIND(l, rows, at);                                                     \
        const IN_##KIND *from = (const void *)((const char *)room + at[2]);             \
        for (long i = 0; i < rows * l->heads; i++)                                      \
            for (long d = 0; d < l->head; d++)                                          \
                to[i * l->head + d] = READ_##KIND(from[i * padded + PLACE_##KIND(d)]);  \
    }                                                                                   \
    void layer_##KIND(const struct layer *l, const struct call *c) {                    \
        long at[8], rows = c->rows, head = l->head, inner = l->inner;                   \
        long hidden = l->hidden, attended = l->heads * head, kept = l->groups * head;   \
        long wide = attended + 2 * kept, padded = WHOLE(head, STEP_##KIND);             \
        places_##KIND(l, rows, at);                                                     \
        char *room = c->room;                                                           \
        IN_##KIND *in = (void *)(room + at[0]), *turned = (void *)(room + at[2]);       \
        TYPE *qkv = (void *)(room + at[1]), *seen = (void *)(room + at[3]);             \
        TYPE *made = (void *)(room + at[4]), *h = (void *)(room + at[5]);               \
        TYPE *gates = (void *)(room + at[6]);                                           \
        IN_##KIND *gated = (void *)(gates + 2 * rows * inner);                          \
        const TYPE *x = c->x, *cos = c->cos, *sin = c->sin;                             \
        TYPE *y = c->y, *keys = c->keys, *values = c->values;                           \
        _Pragma("omp parallel num_threads(c->threads)") {                               \
            _Pragma("omp for schedule(static)")                                         \
            for (long t = 0; t < rows; t++)                                             \
                norm_in_##KIND(&l->before_attention, x + t * hidden, hidden,            \
                               in + t * hidden, l->plain);                              \
            for (long i = 0, n = 0; i < 3; n += l->into[i++].outer)                     \
                if (l->into[i].outer)                                                   \
                    multiply_##KIND(l, &l->into[i], in, hidden, qkv + n, wide, rows);   \
            _Pragma("omp barrier")                                                      \
            _Pragma("omp for schedule(static)")                                         \
            for (long task = 0; task < rows * (l->heads + l->groups); task++) {         \
                long t = task / (l->heads + l->groups), i = task % (l->heads + l->groups);\
                const TYPE *from = qkv + t * wide + i * head;                           \
                const TYPE *cos_at = cos ? cos + t * c->turned : 0;                     \
                const TYPE *sin_at = sin ? sin + t * c->turned : 0;                     \
                float one[padded];                                                      \
                int query = i < l->heads;                                               \
                turn_##KIND(query ? &l->query : &l->key, from, head, cos_at, sin_at,    \
                            c->turned, one);                                            \
                if (query) {                                                            \
                    IN_##KIND *to = turned + (t * l->heads + i) * padded;               \
                    memset(one + head, 0, (padded - head) * sizeof(float));             \
                    for (long d = 0; d < padded; d += LANES)                            \
                        PUT_TURNED_##KIND(to, one, d);                                  \
                } else {                                                                \
                    long g = i - l->heads, row = (c->cached + t) * head;                \
                    TYPE *to = keys + g * c->key_head + row;                            \
                    for (long d = 0; d < head; d += LANES)                              \
                        put_##KIND(to + d, numbers_f32(one + d, head - d), head - d);   \
                    memcpy(values + g * c->value_head + row, from + kept,               \
                           head * sizeof(TYPE));                                        \
                }                                                                       \
            }                                                                           \
            attend_##KIND##_part(turned, padded, keys, c->key_head, head, values,       \
                                 c->value_head, head, seen, c->seen, c->counts,         \
                                 c->cached + rows, rows, l->heads,                      \
                                 l->heads / l->groups, head, head, l->scale);           \
            if (WIDENED_##KIND) {                                                       \
                _Pragma("omp for schedule(static)")                                     \
                for (long t = 0; t < rows; t++)                                         \
                    norm_in_##KIND(&none, seen + t * attended, attended,                \
                                   in + t * attended, l->plain);                        \
            }                                                                           \
            multiply_##KIND(l, &l->out, WIDENED_##KIND ? (void *)in : seen, attended,   \
                            made, hidden, rows);                                        \
            _Pragma("omp barrier")                                                      \
            _Pragma("omp for schedule(static)")                                         \
            for (long t = 0; t < rows; t++) {                                           \
                add_##KIND(&l->after_attention, x + t * hidden, made + t * hidden,      \
                           hidden, h + t * hidden);                                     \
                norm_in_##KIND(&l->before_mlp, h + t * hidden, hidden, in + t * hidden, \
                               l->plain);                                               \
            }                                                                           \
            for (long i = 0, n = 0; i < 2; n += l->gate_up[i++].outer)                  \
                if (l->gate_up[i].outer)                                                \
                    multiply_##KIND(l, &l->gate_up[i], in, hidden, gates + n,           \
                                    2 * inner, rows);                                   \
            _Pragma("omp barrier")                                                      \
            long parts = (inner + 511) / 512;                                           \
            _Pragma("omp for schedule(static)")                                         \
            for (long task = 0; task < rows * parts; task++) {                          \
                long t = task / parts, from = task % parts * 512;                       \
                long end = from + 512 < inner ? from + 512 : inner;                     \
                const TYPE *gate = gates + t * 2 * inner + (l->up_first ? inner : 0);   \
                const TYPE *up = gates + t * 2 * inner + (l->up_first ? 0 : inner);     \
                for (long i = from; i < end; i += LANES) {                              \
                    vfloat v = activated(numbers_##KIND(gate + i, end - i),             \
                                         l->activation);                                \
                    v = rounded_##KIND(v) * numbers_##KIND(up + i, end - i);            \
                    put_in_##KIND(gated + t * inner, i, rounded_##KIND(v), end,         \
                                  l->plain);                                            \
                }                                                                       \
            }                                                                           \
            multiply_##KIND(l, &l->down, gated, inner, made, hidden, rows);             \
            _Pragma("omp barrier")                                                      \
            _Pragma("omp for schedule(static)")                                         \
            for (long t = 0; t < rows; t++)                                             \
                add_##KIND(&l->after_mlp, h + t * hidden, made + t * hidden, hidden,    \
                           y + t * hidden);                                             \
        }                                                                               \
    }

#if defined(__AVX512BF16__)
#define PUT_TURNED_bf16(to, one, d) put_bf16(to + d, load_float(one + d), LANES)
#else
#define PUT_TURNED_bf16(to, one, d)                                                     \
    for (long i = d; i < d + LANES; i++) to[PLACE_bf16(i)] = one[i]
#endif
#define PUT_TURNED_f32(to, one, d) put_f32(to + d, load_float(one + d), LANES)

static const struct norm none = {0};

LAYER(bf16, uint16_t)
LAYER(f32, float)
