/* One decoding step of Gemma 3 on a CPU: the token of each row in, the logits of each row out.

   The twin of gemmule/model/gemma3.py for a single position, where all that counts is how fast the weights are read:
   one team of threads per step, each matrix read once, everything else in fp32 and in the cache. Plain C11, which the
   compiler turns into the machine's own vectors. Letters as in gemma3.py; B rows, D hidden size, N and K heads of
   size H, F MLP width, V vocabulary. native.py compiles and calls it and has the same structures. */

#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { F32, BF16, INT8 };

typedef struct {
    const void *data;    /* (rows, columns), row by row */
    const float *scales; /* (rows,), of int8 alone */
    int64_t rows, columns, kind;
} Matrix;

typedef struct {
    Matrix query, key, value, output, gate, up, down;
    /* Norms are 1 + weight. */
    const float *pre_attention, *post_attention, *pre_mlp, *post_mlp, *query_norm, *key_norm;
    const float *frequencies; /* (H/2,), radians per position */
    float *keys, *values;     /* (B, K, capacity, H); position p lies in slot p % capacity */
    int64_t capacity, window; /* window 0: no limit */
    float factor;             /* by which positions are divided before they turn anything */
} Layer;

typedef struct {
    int64_t batch, width, heads, groups, size, inner, layers;
    float eps, embedding_scale, query_scale;
    Matrix embedding, head;
    const float *norm;
    const Layer *layer;
    int64_t threads;
} Model;

/* ---- a team: whoever is free takes the next piece of work; all wait for the last before what follows ---- */

typedef struct {
    atomic_int arrived, round;
    int size;
} Team;

static void wait_for_all(Team *team) {
    int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) == team->size - 1) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->round, 1);
        return;
    }
    /* Spinning is quickest, but another process may need the core on which the others would run. */
    for (int spins = 0; atomic_load_explicit(&team->round, memory_order_acquire) == round; spins++) {
        if (spins > 5000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

/* A thread that was asleep wakes on the core of the one that woke it, and stays there for longer than a step takes while
   another process has the other core. So each thread takes a core of its own, and gives the choice back afterwards. */
#if defined(__linux__) && defined(_OPENMP)
typedef cpu_set_t Cores;
static int first_core(Cores *allowed) {
    return sched_getaffinity(0, sizeof *allowed, allowed) ? -1 : sched_getcpu();
}
static void take_core(const Cores *allowed, int first, int thread) {
    int core = first;
    for (int passed = 0; first >= 0 && passed < thread;) {
        core = (core + 1) % CPU_SETSIZE;
        passed += CPU_ISSET(core, allowed) != 0;
    }
    Cores mine;
    CPU_ZERO(&mine);
    if (first < 0) return;
    CPU_SET(core, &mine);
    sched_setaffinity(0, sizeof mine, &mine);
}
static void leave_core(const Cores *allowed, int first) {
    if (first >= 0) sched_setaffinity(0, sizeof *allowed, allowed);
}
#else
typedef int Cores;
static int first_core(Cores *allowed) { return *allowed = -1; }
static void take_core(const Cores *allowed, int first, int thread) { (void)allowed, (void)first, (void)thread; }
static void leave_core(const Cores *allowed, int first) { (void)allowed, (void)first; }
#endif

/* ---- matrix times vectors ---- */

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float from_bf16(uint16_t value) { return as_float((uint32_t)value << 16); }

/* All take one row of a matrix at a time: with several at once a core reads a quarter less from memory. */
static float dot_f32(const float *w, const float *x, int64_t columns) {
    float sum = 0;
    for (int64_t i = 0; i < columns; i++) sum += w[i] * x[i];
    return sum;
}

/* Two numbers of bf16 become floats where they lie in their 32 bits; the vector comes as its even and its odd numbers.
   (A machine whose first byte is the largest has them the other way round, and is not supported.) */
static float dot_bf16(const uint16_t *w, const float *even, const float *odd, int64_t columns) {
    float sum = 0, other = 0;
    for (int64_t i = 0; i < columns / 2; i++) {
        uint32_t pair;
        memcpy(&pair, w + 2 * i, sizeof pair);
        sum += as_float(pair << 16) * even[i];
        other += as_float(pair & 0xffff0000u) * odd[i];
    }
    if (columns % 2) sum += from_bf16(w[columns - 1]) * even[columns / 2];
    return sum + other;
}

static int32_t dot_int8(const int8_t *w, const int16_t *x, int64_t columns) {
    int32_t sum = 0;
    for (int64_t i = 0; i < columns; i++) sum += (int32_t)(int16_t)w[i] * x[i];
    return sum;
}

/* Vectors in the form that a matrix is multiplied with: for bf16 their even numbers before the odd ones, for int8
   sixteen bits and one scale for each block. So many products of 127 and 32767 fit into the 32 bits of a sum. */
enum { BLOCK = 512, PIECE = 65536 };
typedef struct {
    float *numbers; /* (B, columns), of which int8's take half the room */
    float *scales;  /* (B, blocks) */
} Ready;

static int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

static void narrow(const float *x, int64_t columns, int16_t *numbers, float *scales) {
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
        float most = 1e-30f;
        for (int64_t i = first; i < last; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        for (int64_t i = first; i < last; i++)
            numbers[i] = (int16_t)(x[i] * (32767 / most) + copysignf(0.5f, x[i]));
        scales[first / BLOCK] = most / 32767;
    }
}

static void make_ready(int64_t batch, const Matrix *m, const float *x, const Ready *ready) {
    int64_t columns = m->columns, evens = (columns + 1) / 2;
    for (int64_t row = 0; row < batch; row++, x += columns) {
        float *numbers = ready->numbers + row * columns;
        if (m->kind == INT8) narrow(x, columns, (int16_t *)numbers, ready->scales + row * blocks_of(columns));
        if (m->kind == BF16)
            for (int64_t i = 0; i < columns; i++) numbers[i / 2 + i % 2 * evens] = x[i];
    }
}

/* Rows first..first + count of m times row `row` of x, which was made ready for m. */
static void rows_times(const Matrix *m, int64_t first, int64_t count, const float *x, const Ready *ready, int64_t row,
                       float *out) {
    int64_t columns = m->columns;
    const float *numbers = ready->numbers + row * columns, *scales = ready->scales + row * blocks_of(columns);
    x += row * columns;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = (first + i) * columns;
        if (m->kind == F32) out[i] = dot_f32((const float *)m->data + at, x, columns);
        if (m->kind == BF16)
            out[i] = dot_bf16((const uint16_t *)m->data + at, numbers, numbers + (columns + 1) / 2, columns);
        if (m->kind != INT8) continue;
        out[i] = 0;
        for (int64_t skip = 0; skip < columns; skip += BLOCK) {
            int64_t size = columns - skip < BLOCK ? columns - skip : BLOCK;
            const int8_t *w = (const int8_t *)m->data + at + skip;
            out[i] += scales[skip / BLOCK] * (float)dot_int8(w, (const int16_t *)numbers + skip, size);
        }
        out[i] *= m->scales[first + i];
    }
}

/* As many rows as are worth the asking. */
static int64_t piece_of(const Matrix *m) {
    int64_t rows = PIECE / m->columns;
    return rows < 1 ? 1 : rows;
}

/* out (B, rows of m) = m times each row of x (B, columns); `next` is shared, so that each piece is done once. */
static void multiply(atomic_long *next, int64_t batch, const Matrix *m, const float *x, const Ready *ready,
                     float *out) {
    make_ready(batch, m, x, ready);
    int64_t piece = piece_of(m);
    for (int64_t at; (at = atomic_fetch_add(next, piece)) < m->rows;) {
        int64_t count = at + piece < m->rows ? piece : m->rows - at;
        for (int64_t row = 0; row < batch; row++)
            rows_times(m, at, count, x, ready, row, out + row * m->rows + at);
    }
}

/* ---- what happens to one vector ---- */

static void normalise(const float *x, const float *gain, int64_t size, float eps, float *out) {
    float sum = 0;
    for (int64_t i = 0; i < size; i++) sum += x[i] * x[i];
    float scale = 1 / sqrtf(sum / (float)size + eps);
    for (int64_t i = 0; i < size; i++) out[i] = x[i] * scale * gain[i];
}

static void rotate(float *x, const float *cosines, const float *sines, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + half] = second * cosines[i] + first * sines[i];
    }
}

/* e to the x, of which a compiler can make vectors, unlike of the library's: 2^k times a polynomial of what is left. */
static inline float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float k = rintf(x * 1.44269504f), r = x - k * 0.693147181f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * as_float((uint32_t)((int32_t)k + 127) << 23);
}

/* x times (1 + tanh y) / 2, which is x over 1 + e^(-2y). */
static inline float gelu(float x) {
    return x / (1 + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

/* One query over the positions first..last of its group's ring; out (H,). */
static void attend(const float *query, const float *keys, const float *values, int64_t first, int64_t last,
                   int64_t capacity, int64_t size, float *scores, float *out) {
    float most = -3e38f, total = 0;
    for (int64_t p = first; p <= last; p++) {
        scores[p - first] = dot_f32(keys + p % capacity * size, query, size);
        if (scores[p - first] > most) most = scores[p - first];
    }
    memset(out, 0, (size_t)size * sizeof *out);
    for (int64_t p = first; p <= last; p++) {
        float weight = expf(scores[p - first] - most);
        const float *value = values + p % capacity * size;
        total += weight;
        for (int64_t i = 0; i < size; i++) out[i] += weight * value[i];
    }
    for (int64_t i = 0; i < size; i++) out[i] /= total;
}

/* ---- the step ---- */

/* What all threads see: the results of matrices and heads, for all rows. */
typedef struct {
    float *query, *key, *value, *mixed, *output, *gate, *up, *down;
} Shared;

static void embed(const Model *m, const int64_t *tokens, float *x) {
    const Matrix *e = &m->embedding;
    for (int64_t row = 0; row < m->batch; row++) {
        int64_t from = tokens[row] * m->width;
        for (int64_t i = 0; i < m->width; i++) {
            float value = e->kind == F32    ? ((const float *)e->data)[from + i]
                          : e->kind == BF16 ? from_bf16(((const uint16_t *)e->data)[from + i])
                                            : (float)((const int8_t *)e->data)[from + i] * e->scales[tokens[row]];
            x[row * m->width + i] = value * m->embedding_scale;
        }
    }
}

/* Norm and turn one head of one row; the keys and values go to their places in the cache. */
static void place_head(const Model *m, const Layer *l, const Shared *s, int64_t item, const int64_t *positions,
                       float *angles) {
    int64_t all = m->heads + m->groups, row = item / all, head = item % all, half = m->size / 2;
    int64_t at = positions[row];
    float *cosines = angles, *sines = angles + half;
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)at / l->factor * l->frequencies[i];
        cosines[i] = cosf(angle), sines[i] = sinf(angle);
    }
    if (head < m->heads) {
        float *query = s->query + (row * m->heads + head) * m->size;
        normalise(query, l->query_norm, m->size, m->eps, query);
        rotate(query, cosines, sines, half);
        for (int64_t i = 0; i < m->size; i++) query[i] *= m->query_scale;
        return;
    }
    int64_t group = row * m->groups + head - m->heads;
    int64_t slot = (group * l->capacity + at % l->capacity) * m->size;
    normalise(s->key + group * m->size, l->key_norm, m->size, m->eps, l->keys + slot);
    rotate(l->keys + slot, cosines, sines, half);
    memcpy(l->values + slot, s->value + group * m->size, (size_t)m->size * sizeof(float));
}

static void attend_head(const Model *m, const Layer *l, const Shared *s, int64_t item, const int64_t *positions,
                        float *scores) {
    int64_t row = item / m->heads, head = item % m->heads, last = positions[row];
    int64_t first = l->window && last >= l->window ? last - l->window + 1 : 0;
    int64_t ring = (row * m->groups + head / (m->heads / m->groups)) * l->capacity * m->size;
    attend(s->query + item * m->size, l->keys + ring, l->values + ring, first, last, l->capacity, m->size, scores,
           s->mixed + item * m->size);
}

/* Each thread adds for itself: cheaper than waiting for one that does it for all. */
static void add_branch(const Model *m, const float *branch, const float *gain, float *x, float *normed) {
    for (int64_t row = 0; row < m->batch; row++) {
        normalise(branch + row * m->width, gain, m->width, m->eps, normed);
        for (int64_t i = 0; i < m->width; i++) x[row * m->width + i] += normed[i];
    }
}

static void norm_rows(const Model *m, const float *x, const float *gain, float *out) {
    for (int64_t row = 0; row < m->batch; row++)
        normalise(x + row * m->width, gain, m->width, m->eps, out + row * m->width);
}

enum { WORKS = 8 }; /* counters a layer uses */

static void block(const Model *m, const Layer *l, const Shared *s, Team *team, atomic_long *next,
                  const int64_t *positions, float *x, float *h, float *scores, const Ready *ready) {
    norm_rows(m, x, l->pre_attention, h);
    multiply(next++, m->batch, &l->query, h, ready, s->query);
    multiply(next++, m->batch, &l->key, h, ready, s->key);
    multiply(next++, m->batch, &l->value, h, ready, s->value);
    wait_for_all(team);
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < m->batch * (m->heads + m->groups);)
        place_head(m, l, s, item, positions, scores);
    next++;
    wait_for_all(team);
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < m->batch * m->heads;)
        attend_head(m, l, s, item, positions, scores);
    next++;
    wait_for_all(team);
    multiply(next++, m->batch, &l->output, s->mixed, ready, s->output);
    wait_for_all(team);
    add_branch(m, s->output, l->post_attention, x, h);

    norm_rows(m, x, l->pre_mlp, h);
    make_ready(m->batch, &l->gate, h, ready);
    int64_t piece = piece_of(&l->gate);
    for (int64_t at; (at = atomic_fetch_add(next, piece)) < m->inner;) {
        int64_t count = at + piece < m->inner ? piece : m->inner - at;
        for (int64_t row = 0; row < m->batch; row++) {
            float *gate = s->gate + row * m->inner + at, *up = s->up + row * m->inner + at;
            rows_times(&l->gate, at, count, h, ready, row, gate);
            rows_times(&l->up, at, count, h, ready, row, up);
            for (int64_t i = 0; i < count; i++) gate[i] = gelu(gate[i]) * up[i];
        }
    }
    next++;
    wait_for_all(team);
    multiply(next++, m->batch, &l->down, s->gate, ready, s->down);
    wait_for_all(team);
    add_branch(m, s->down, l->post_mlp, x, h);
}

static float *take(float **free, int64_t count) {
    float *taken = *free;
    *free += (count + 15) / 16 * 16;
    return taken;
}

/* The floats that a step needs for all threads, and for each; a row of scores is at most `longest` positions. */
static int64_t floats_shared(const Model *m) {
    return m->batch * (2 * m->heads * m->size + 2 * m->groups * m->size + 2 * m->width + 2 * m->inner) + 8 * 16;
}
static int64_t widest(const Model *m) {
    int64_t most = m->heads * m->size > m->inner ? m->heads * m->size : m->inner;
    return m->width > most ? m->width : most;
}
static int64_t floats_of_one(const Model *m, int64_t longest) {
    int64_t ready = m->batch * (widest(m) + blocks_of(widest(m)));
    return 2 * m->batch * m->width + (longest > m->size ? longest : m->size) + ready + 5 * 16;
}

/* tokens (B,) at positions (B,) -> logits (B, V); the cache holds them afterwards. Returns 0, or 1 without memory. */
int step(const Model *m, const int64_t *tokens, const int64_t *positions, int64_t longest, float *logits) {
    int64_t shared_floats = floats_shared(m), own_floats = floats_of_one(m, longest);
    float *memory = malloc((size_t)(shared_floats + m->threads * own_floats) * sizeof *memory);
    atomic_long *next = calloc((size_t)(m->layers * WORKS + 1), sizeof *next);
    if (!memory || !next) {
        free(memory), free(next);
        return 1;
    }
    float *left = memory;
    int64_t queries = m->batch * m->heads * m->size, keys = m->batch * m->groups * m->size;
    Shared s = {take(&left, queries), take(&left, keys), take(&left, keys), take(&left, queries),
                take(&left, m->batch * m->width), take(&left, m->batch * m->inner),
                take(&left, m->batch * m->inner), take(&left, m->batch * m->width)};
    Team team = {.size = 1};
    Cores cores;
    int first = first_core(&cores);
#pragma omp parallel num_threads((int)m->threads)
    {
        int me = 0;
#ifdef _OPENMP
        me = omp_get_thread_num();
#pragma omp single
        team.size = omp_get_num_threads();
#endif
        take_core(&cores, first, me);
        float *own = memory + shared_floats + me * own_floats;
        float *x = take(&own, m->batch * m->width), *h = take(&own, m->batch * m->width);
        float *scores = take(&own, longest > m->size ? longest : m->size);
        float *scales = take(&own, m->batch * blocks_of(widest(m)));
        Ready ready = {own, scales};
        embed(m, tokens, x);
        for (int64_t i = 0; i < m->layers; i++)
            block(m, &m->layer[i], &s, &team, next + i * WORKS, positions, x, h, scores, &ready);
        norm_rows(m, x, m->norm, h);
        multiply(next + m->layers * WORKS, m->batch, &m->head, h, &ready, logits);
        leave_core(&cores, first);
    }
    free(memory), free(next);
    return 0;
}
