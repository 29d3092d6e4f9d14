/* One decoding step of Gemma 3 on a CPU: one token per row in, the logits of each row out.

   The forward pass of gemmule/model/gemma3.py for one position per row, which is bound by how fast weights are read:
   one team of threads per step, each matrix read once, activations in fp32 and in the processor's cache. Plain C11,
   which the compiler vectorizes. Letters as in gemma3.py; B rows, D hidden size, N and K heads of
   size H, F MLP width, V vocabulary. library.py compiles it, binding.py has the same structures. */

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
    const float *scales; /* (rows,), int8 only */
    int64_t rows, columns, kind;
} Matrix;

typedef struct {
    Matrix query, key, value, output, gate, up, down;
    /* Norms are 1 + weight. */
    const float *pre_attention, *post_attention, *pre_mlp, *post_mlp, *query_norm, *key_norm;
    const float *frequencies; /* (H/2,), radians per position */
    float *keys, *values;     /* (B, K, capacity, H); position p lies in slot p % capacity */
    int64_t capacity, window; /* window 0: no limit */
    float factor;             /* RoPE scaling: positions are divided by it */
} Layer;

typedef struct {
    int64_t batch, width, heads, groups, size, inner, layers;
    float eps, embedding_scale, query_scale;
    Matrix embedding, head;
    const float *norm;
    const Layer *layer;
    int64_t threads;
} Model;

/* ---- thread team: dynamic scheduling by shared counters, a barrier between stages ---- */

typedef struct {
    atomic_int arrived, round;
    int size;
} Team;

static void barrier(Team *team) {
    int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) == team->size - 1) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->round, 1);
        return;
    }
    /* Spinning has the lowest latency, but another process may need the core on which the others would run. */
    for (int spins = 0; atomic_load_explicit(&team->round, memory_order_acquire) == round; spins++) {
        if (spins > 5000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
}

/* Thread affinity. A sleeping thread wakes on the core of the one that woke it, and stays there for longer than a step
   takes while another process has the other core. So each thread is bound to a core of its own for one step, and its
   affinity mask is restored afterwards. Where the calling thread may use fewer cores than there are threads, they were
   bound by somebody else (OMP_PROC_BIND, taskset) and stay as they are. */
#if defined(__linux__) && defined(_OPENMP)
typedef cpu_set_t Cores;
static int first_core(Cores *allowed, int64_t threads) {
    if (sched_getaffinity(0, sizeof *allowed, allowed) || CPU_COUNT(allowed) < threads) return -1;
    return sched_getcpu();
}
/* Returns whether the thread was bound, so that its affinity mask must be restored. */
static int bind_core(const Cores *allowed, int first, int thread, Cores *own) {
    if (first < 0 || sched_getaffinity(0, sizeof *own, own)) return 0;
    int core = first;
    for (int passed = 0; passed < thread;) {
        core = (core + 1) % CPU_SETSIZE;
        passed += CPU_ISSET(core, allowed) != 0;
    }
    Cores target;
    CPU_ZERO(&target);
    CPU_SET(core, &target);
    return !sched_setaffinity(0, sizeof target, &target);
}
static void restore_cores(const Cores *own) { sched_setaffinity(0, sizeof *own, own); }
#else
typedef int Cores;
static int first_core(Cores *allowed, int64_t threads) { return (void)threads, *allowed = -1; }
static int bind_core(const Cores *allowed, int first, int thread, Cores *own) {
    return (void)allowed, (void)first, (void)thread, (void)own, 0;
}
static void restore_cores(const Cores *own) { (void)own; }
#endif

/* ---- matmuls ---- */

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
enum { INFINITE = 0x7f800000 };
static inline uint32_t magnitude(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}
static inline float from_bf16(uint16_t value) { return float_of_bits((uint32_t)value << 16); }

/* Dot products, one row of a matrix at a time: with several at once a core reads a quarter less from memory. */
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
        sum += float_of_bits(pair << 16) * even[i];
        other += float_of_bits(pair & 0xffff0000u) * odd[i];
    }
    if (columns % 2) sum += from_bf16(w[columns - 1]) * even[columns / 2];
    return sum + other;
}

static int32_t dot_int8(const int8_t *w, const int16_t *x, int64_t columns) {
    int32_t sum = 0;
    for (int64_t i = 0; i < columns; i++) sum += (int32_t)(int16_t)w[i] * x[i];
    return sum;
}

/* The activations of a matmul, converted for the kind of matrix: for bf16 the even numbers before the odd ones, for
   int8 sixteen bits and one scale per block. So many products of 127 and 32767 fit into the 32 bits of a sum. */
enum { BLOCK = 512, TASK = 65536 };
typedef struct {
    float *numbers; /* (B, columns), of which int8 uses half */
    float *scales;  /* (B, blocks) */
} Operand;

static int64_t blocks_of(int64_t columns) { return (columns + BLOCK - 1) / BLOCK; }

static void quantize_activations(const float *x, int64_t columns, int16_t *numbers, float *scales) {
    for (int64_t first = 0; first < columns; first += BLOCK) {
        int64_t last = first + BLOCK < columns ? first + BLOCK : columns;
        /* Without their signs, the bits of floats are in the order of the numbers; infinity and NaN come last. */
        uint32_t bits = 0;
        for (int64_t i = first; i < last; i++) bits = magnitude(x[i]) > bits ? magnitude(x[i]) : bits;
        float most = float_of_bits(bits) > 1e-30f ? float_of_bits(bits) : 1e-30f;
        int finite = bits < INFINITE;
        for (int64_t i = first; i < last; i++)
            numbers[i] = finite ? (int16_t)(x[i] * (32767 / most) + copysignf(0.5f, x[i])) : 1;
        scales[first / BLOCK] = finite ? most / 32767 : NAN;
    }
}

static void prepare_operand(int64_t batch, const Matrix *m, const float *x, const Operand *operand) {
    int64_t columns = m->columns, evens = (columns + 1) / 2;
    for (int64_t row = 0; row < batch; row++, x += columns) {
        float *numbers = operand->numbers + row * columns;
        if (m->kind == INT8)
            quantize_activations(x, columns, (int16_t *)numbers, operand->scales + row * blocks_of(columns));
        if (m->kind == BF16)
            for (int64_t i = 0; i < columns; i++) numbers[i / 2 + i % 2 * evens] = x[i];
    }
}

/* Rows first..first + count of m times row `row` of x, which was prepared for m. */
static void matmul_rows(const Matrix *m, int64_t first, int64_t count, const float *x, const Operand *operand,
                        int64_t row, float *out) {
    int64_t columns = m->columns;
    const float *numbers = operand->numbers + row * columns, *scales = operand->scales + row * blocks_of(columns);
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

/* Rows per task, enough to make a fetch from the shared counter cheap. */
static int64_t rows_per_task(const Matrix *m) {
    int64_t rows = TASK / m->columns;
    return rows < 1 ? 1 : rows;
}

/* out (B, rows of m) = m times each row of x (B, columns); `next` is the shared counter of rows. */
static void matmul(atomic_long *next, int64_t batch, const Matrix *m, const float *x, const Operand *operand,
                   float *out) {
    prepare_operand(batch, m, x, operand);
    int64_t piece = rows_per_task(m);
    for (int64_t at; (at = atomic_fetch_add(next, piece)) < m->rows;) {
        int64_t count = at + piece < m->rows ? piece : m->rows - at;
        for (int64_t row = 0; row < batch; row++)
            matmul_rows(m, at, count, x, operand, row, out + row * m->rows + at);
    }
}

/* ---- norm, RoPE, activation, attention ---- */

static void rms_norm(const float *x, const float *gain, int64_t size, float eps, float *out) {
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

/* exp(x) that a compiler can vectorize, unlike the library's: 2^k times a polynomial of the remainder. */
static inline float fast_exp(float x) {
    x = x > -87 ? x < 88 ? x : 88 : -87; /* NaN becomes -87, for it cannot become an integer */
    float k = rintf(x * 1.44269504f), r = x - k * 0.693147181f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * float_of_bits((uint32_t)((int32_t)k + 127) << 23);
}

/* GELU, tanh form: x (1 + tanh y) / 2 = x / (1 + exp(-2y)). */
static inline float gelu(float x) {
    return x / (1 + fast_exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

/* Attention of one query over the positions first..last in its group's ring; out (H,). */
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

/* Activations shared by all threads, for all rows. */
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

/* Norm and RoPE of one head of one row; keys and values are written into the KV cache. */
static void norm_and_rotate_head(const Model *m, const Layer *l, const Shared *s, int64_t item,
                                 const int64_t *positions, float *angles) {
    int64_t all = m->heads + m->groups, row = item / all, head = item % all, half = m->size / 2;
    int64_t at = positions[row];
    float *cosines = angles, *sines = angles + half;
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)at / l->factor * l->frequencies[i];
        cosines[i] = cosf(angle), sines[i] = sinf(angle);
    }
    if (head < m->heads) {
        float *query = s->query + (row * m->heads + head) * m->size;
        rms_norm(query, l->query_norm, m->size, m->eps, query);
        rotate(query, cosines, sines, half);
        for (int64_t i = 0; i < m->size; i++) query[i] *= m->query_scale;
        return;
    }
    int64_t group = row * m->groups + head - m->heads;
    int64_t slot = (group * l->capacity + at % l->capacity) * m->size;
    rms_norm(s->key + group * m->size, l->key_norm, m->size, m->eps, l->keys + slot);
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

/* Each thread has its own residual stream: cheaper than a barrier. */
static void add_residual(const Model *m, const float *branch, const float *gain, float *x, float *normed) {
    for (int64_t row = 0; row < m->batch; row++) {
        rms_norm(branch + row * m->width, gain, m->width, m->eps, normed);
        for (int64_t i = 0; i < m->width; i++) x[row * m->width + i] += normed[i];
    }
}

static void norm_rows(const Model *m, const float *x, const float *gain, float *out) {
    for (int64_t row = 0; row < m->batch; row++)
        rms_norm(x + row * m->width, gain, m->width, m->eps, out + row * m->width);
}

enum { COUNTERS = 8 }; /* per layer */

static void block(const Model *m, const Layer *l, const Shared *s, Team *team, atomic_long *next,
                  const int64_t *positions, float *x, float *h, float *scores, const Operand *operand) {
    norm_rows(m, x, l->pre_attention, h);
    matmul(next++, m->batch, &l->query, h, operand, s->query);
    matmul(next++, m->batch, &l->key, h, operand, s->key);
    matmul(next++, m->batch, &l->value, h, operand, s->value);
    barrier(team);
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < m->batch * (m->heads + m->groups);)
        norm_and_rotate_head(m, l, s, item, positions, scores);
    next++;
    barrier(team);
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < m->batch * m->heads;)
        attend_head(m, l, s, item, positions, scores);
    next++;
    barrier(team);
    matmul(next++, m->batch, &l->output, s->mixed, operand, s->output);
    barrier(team);
    add_residual(m, s->output, l->post_attention, x, h);

    norm_rows(m, x, l->pre_mlp, h);
    prepare_operand(m->batch, &l->gate, h, operand);
    int64_t piece = rows_per_task(&l->gate);
    for (int64_t at; (at = atomic_fetch_add(next, piece)) < m->inner;) {
        int64_t count = at + piece < m->inner ? piece : m->inner - at;
        for (int64_t row = 0; row < m->batch; row++) {
            float *gate = s->gate + row * m->inner + at, *up = s->up + row * m->inner + at;
            matmul_rows(&l->gate, at, count, h, operand, row, gate);
            matmul_rows(&l->up, at, count, h, operand, row, up);
            for (int64_t i = 0; i < count; i++) gate[i] = gelu(gate[i]) * up[i];
        }
    }
    next++;
    barrier(team);
    matmul(next++, m->batch, &l->down, s->gate, operand, s->down);
    barrier(team);
    add_residual(m, s->down, l->post_mlp, x, h);
}

static float *allocate(float **free, int64_t count) {
    float *taken = *free;
    *free += (count + 15) / 16 * 16;
    return taken;
}

/* Workspace in floats, shared and per thread; attention scores are of at most `longest` positions. */
static int64_t shared_floats_of(const Model *m) {
    return m->batch * (2 * m->heads * m->size + 2 * m->groups * m->size + 2 * m->width + 2 * m->inner) + 8 * 16;
}
static int64_t max_columns(const Model *m) {
    int64_t most = m->heads * m->size > m->inner ? m->heads * m->size : m->inner;
    return m->width > most ? m->width : most;
}
static int64_t floats_per_thread(const Model *m, int64_t longest) {
    int64_t operand = m->batch * (max_columns(m) + blocks_of(max_columns(m)));
    return 2 * m->batch * m->width + (longest > m->size ? longest : m->size) + operand + 5 * 16;
}

enum { DONE, NO_MEMORY, BAD_TOKEN, BAD_POSITION };

/* tokens (B,) at positions (B,) -> logits (B, V); the cache holds them afterwards. Tokens are below V, positions below
   `longest`: nothing is read or written where one is not. */
int step(const Model *m, const int64_t *tokens, const int64_t *positions, int64_t longest, float *logits) {
    for (int64_t row = 0; row < m->batch; row++) {
        if (tokens[row] < 0 || tokens[row] >= m->embedding.rows) return BAD_TOKEN;
        if (positions[row] < 0 || positions[row] >= longest) return BAD_POSITION;
    }
    int64_t shared_floats = shared_floats_of(m), own_floats = floats_per_thread(m, longest);
    float *memory = malloc((size_t)(shared_floats + m->threads * own_floats) * sizeof *memory);
    atomic_long *next = calloc((size_t)(m->layers * COUNTERS + 1), sizeof *next);
    if (!memory || !next) {
        free(memory), free(next);
        return NO_MEMORY;
    }
    float *left = memory;
    int64_t queries = m->batch * m->heads * m->size, keys = m->batch * m->groups * m->size;
    Shared s = {allocate(&left, queries), allocate(&left, keys), allocate(&left, keys), allocate(&left, queries),
                allocate(&left, m->batch * m->width), allocate(&left, m->batch * m->inner),
                allocate(&left, m->batch * m->inner), allocate(&left, m->batch * m->width)};
    Team team = {.size = 1};
    Cores cores;
    int first = first_core(&cores, m->threads);
#pragma omp parallel num_threads((int)m->threads)
    {
        int me = 0;
#ifdef _OPENMP
        me = omp_get_thread_num();
#pragma omp single
        team.size = omp_get_num_threads();
#endif
        Cores before;
        int bound = bind_core(&cores, first, me, &before);
        float *own = memory + shared_floats + me * own_floats;
        float *x = allocate(&own, m->batch * m->width), *h = allocate(&own, m->batch * m->width);
        float *scores = allocate(&own, longest > m->size ? longest : m->size);
        float *scales = allocate(&own, m->batch * blocks_of(max_columns(m)));
        Operand operand = {own, scales};
        embed(m, tokens, x);
        for (int64_t i = 0; i < m->layers; i++)
            block(m, &m->layer[i], &s, &team, next + i * COUNTERS, positions, x, h, scores, &operand);
        norm_rows(m, x, m->norm, h);
        matmul(next + m->layers * COUNTERS, m->batch, &m->head, h, &operand, logits);
        if (bound) restore_cores(&before);
    }
    free(memory), free(next);
    return DONE;
}
