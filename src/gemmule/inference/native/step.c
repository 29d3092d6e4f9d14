/* The forward pass of Gemma 3 on a CPU, for tokens of any sequences: a step reads some tokens of each, and gives logits.

   What gemmule/model/gemma3.py computes, with one team of threads per step; each matrix is read once for all tokens,
   activations are fp32. The result of a token does not depend on the others of its step, bit for bit: every sum has one
   order, that of its own columns or positions, whatever the size of the tile in which it is computed. So sums are
   written in vectors of a fixed number of lanes, and the compiler must neither reorder them (no -ffast-math) nor choose
   where a product and a sum are rounded together (-ffp-contract=off): `fused` says where.
   Letters as in gemma3.py; T tokens of the step, D hidden size, N and K heads of size H, F MLP width, V vocabulary.
   library.py compiles this file, binding.py has the same structures. */

#include <math.h>
#if !defined(__wasm__)
#include <sched.h>
#endif
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif

enum { F32, BF16, INT8 };
enum { LOCAL, GLOBAL, KINDS };
enum { PAGE = 16 }; /* positions of a page of the KV cache */

typedef struct {
    const void *data;    /* (rows, columns), row by row */
    const float *scales; /* (rows,), int8 only */
    int64_t rows, columns, kind;
} Matrix;

typedef struct {
    Matrix query, key, value, output, gate, up, down;
    /* Norms are 1 + weight. */
    const float *pre_attention, *post_attention, *pre_mlp, *post_mlp, *query_norm, *key_norm;
    int64_t kind, offset; /* LOCAL or GLOBAL; where in a page of that kind its keys (K, H, PAGE) and values (K, PAGE, H) lie */
} Layer;

typedef struct {
    const float *frequencies; /* (H/2,), radians per position */
    int64_t window;           /* 0: no limit */
    float factor;             /* RoPE scaling: positions are divided by it */
} Kind;

typedef struct {
    int64_t width, heads, groups, size, inner, layers;
    float eps, embedding_scale, query_scale;
    Matrix embedding, head;
    const float *norm;
    const Layer *layer;
    Kind kinds[KINDS];
    int64_t threads;
} Model;

typedef struct {
    float *memory;        /* (pages, floats of a page) */
    int64_t pages, floats;
    const int32_t *table; /* (rows, longest / PAGE): the page that holds positions PAGE i ... PAGE i + 15 of a row */
} Pages;

typedef struct {
    int64_t count, rows, longest;             /* tokens; sequences; positions that the tables have entries for */
    const int64_t *tokens, *positions, *row;  /* (T,), positions of a row in ascending order */
    int64_t outputs;
    const int64_t *output;                    /* (outputs,): the tokens whose logits are wanted */
    Pages pages[KINDS];
} Batch;

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
#if !defined(__wasm__) /* which has one thread, that never waits */
        if (spins > 5000) sched_yield();
#endif
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

/* ---- vectors ---- */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t Signed __attribute__((vector_size(4 * LANES)));

static inline Floats load(const float *from) { return *(const Floats *)from; }

/* a * b + c, rounded once where the processor has an instruction for it. */
#if defined(__FMA__)
static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#if LANES == 16
static inline Floats fused_lanes(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#else
static inline Floats fused_lanes(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif
#elif defined(__aarch64__)
static inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline Floats fused_lanes(Floats a, Floats b, Floats c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
static inline float fused(float a, float b, float c) { return a * b + c; }
static inline Floats fused_lanes(Floats a, Floats b, Floats c) { return a * b + c; }
#endif
static inline Floats fill(float value) { return value - (Floats){0}; }

/* Lanes of two vectors by their indices, those of the second one after those of the first. */
#if defined(__clang__) || __GNUC__ >= 12
#define LANES_OF(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LANES_OF(a, b, ...) __builtin_shuffle(a, b, (Signed){__VA_ARGS__})
#endif

/* The sums of the lanes of four vectors. Of one vector, each half is added to the other, and so on to the last two: the
   same order for each of the four, so that a sum does not depend on its neighbours. */
static inline void sum_lanes(const Floats v[4], float *out) {
    Floats four;
#if LANES == 16
    Floats a = LANES_OF(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               LANES_OF(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    Floats b = LANES_OF(v[2], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               LANES_OF(v[2], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    four = LANES_OF(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           LANES_OF(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    four += LANES_OF(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    four += LANES_OF(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif LANES == 8
    Floats a = LANES_OF(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) + LANES_OF(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
    Floats b = LANES_OF(v[2], v[3], 0, 1, 2, 3, 8, 9, 10, 11) + LANES_OF(v[2], v[3], 4, 5, 6, 7, 12, 13, 14, 15);
    four = LANES_OF(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + LANES_OF(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
    four += LANES_OF(four, four, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    Floats a = LANES_OF(v[0], v[1], 0, 1, 4, 5) + LANES_OF(v[0], v[1], 2, 3, 6, 7);
    Floats b = LANES_OF(v[2], v[3], 0, 1, 4, 5) + LANES_OF(v[2], v[3], 2, 3, 6, 7);
    four = LANES_OF(a, b, 0, 2, 4, 6) + LANES_OF(a, b, 1, 3, 5, 7);
#endif
    for (int i = 0; i < 4; i++) out[i] = four[i * LANES / 4];
}
static inline float sum_of(Floats v) {
    Floats alone[4] = {v};
    float sums[4];
    sum_lanes(alone, sums);
    return sums[0];
}

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

/* ---- matmuls ---- */

/* The activations of a matmul, converted for the kind of matrix: for bf16 the even numbers before the odd ones, for
   int8 sixteen bits and one scale per block. So many products of 127 and 32767 fit into the 32 bits of a sum. */
enum { BLOCK = 512, TASK = 65536 };
typedef struct {
    float *numbers; /* (T, columns), of which int8 uses half */
    float *scales;  /* (T, blocks) */
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

/* Row `row` of the operand of matrices of this kind, from x (columns,). */
static void prepare_operand(int64_t kind, const float *x, int64_t columns, int64_t row, const Operand *operand) {
    float *numbers = operand->numbers + row * columns;
    int64_t evens = (columns + 1) / 2;
    if (kind == F32) memcpy(numbers, x, (size_t)columns * sizeof *x);
    if (kind == INT8) quantize_activations(x, columns, (int16_t *)numbers, operand->scales + row * blocks_of(columns));
    if (kind != BF16) return;
    for (int64_t i = 0; i < columns / 2; i++) numbers[i] = x[2 * i], numbers[evens + i] = x[2 * i + 1];
    if (columns % 2) numbers[evens - 1] = x[columns - 1];
}

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* The largest tiles whose sums stay in the registers, of which there are 32 or 16. */
#if LANES == 16 || defined(__aarch64__)
enum { HIGH_F32 = 5, HIGH = 4, WIDE = 4 };
#else
enum { HIGH_F32 = 2, HIGH = 2, WIDE = 4 };
#endif

/* A tile: `high` rows of the operand (columns apart) times `wide` rows of a matrix, out[i * stride + j]. */
INLINE void tile_f32(const float *w, const float *x, int64_t columns, int high, int wide, float *out, int64_t stride) {
    Floats sum[HIGH_F32][WIDE] = {0};
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        Floats weight[WIDE];
        UNROLL for (int j = 0; j < wide; j++) weight[j] = load(w + j * columns + c);
        UNROLL for (int i = 0; i < high; i++) {
            Floats value = load(x + i * columns + c);
            UNROLL for (int j = 0; j < wide; j++) sum[i][j] = fused_lanes(value, weight[j], sum[i][j]);
        }
    }
    UNROLL for (int i = 0; i < high; i++) {
        float sums[4];
        sum_lanes(sum[i], sums);
        UNROLL for (int j = 0; j < wide; j++) {
            float rest = 0;
            for (int64_t d = c; d < columns; d++) rest = fused(x[i * columns + d], w[j * columns + d], rest);
            out[i * stride + j] = sums[j] + rest;
        }
    }
}

/* Two numbers of bf16 become floats where they lie in their 32 bits.
   (A machine whose first byte is the largest has them the other way round, and is not supported.) */
INLINE void tile_bf16(const uint16_t *w, const float *x, int64_t columns, int high, int wide, float *out,
                      int64_t stride) {
    Floats even[HIGH_F32][2] = {0}, odd[HIGH_F32][2] = {0};
    int64_t evens = (columns + 1) / 2, c = 0;
    for (; c + LANES <= columns / 2; c += LANES) {
        UNROLL for (int j = 0; j < wide; j++) {
            Words pairs = *(const Words *)(w + j * columns + 2 * c);
            Words low = pairs << 16, high_half = pairs & 0xffff0000u;
            Floats first = (Floats)low, second = (Floats)high_half;
            UNROLL for (int i = 0; i < high; i++) {
                even[i][j] = fused_lanes(load(x + i * columns + c), first, even[i][j]);
                odd[i][j] = fused_lanes(load(x + i * columns + evens + c), second, odd[i][j]);
            }
        }
    }
    UNROLL for (int i = 0; i < high; i++) {
        Floats both[4] = {0};
        float sums[4];
        UNROLL for (int j = 0; j < wide; j++) both[j] = even[i][j] + odd[i][j];
        sum_lanes(both, sums);
        UNROLL for (int j = 0; j < wide; j++) {
            float rest = 0;
            const uint16_t *row = w + j * columns;
            for (int64_t d = c; d < columns / 2; d++) {
                rest = fused(x[i * columns + d], from_bf16(row[2 * d]), rest);
                rest = fused(x[i * columns + evens + d], from_bf16(row[2 * d + 1]), rest);
            }
            if (columns % 2) rest = fused(x[i * columns + evens - 1], from_bf16(row[columns - 1]), rest);
            out[i * stride + j] = sums[j] + rest;
        }
    }
}

static int32_t dot_int8(const int8_t *w, const int16_t *x, int64_t columns) {
    int32_t sum = 0;
    int64_t i = 0;
#if defined(__wasm_simd128__) /* whose compilers do not find this instruction by themselves */
    v128_t sums = wasm_i32x4_const_splat(0);
    for (; i + 16 <= columns; i += 16) {
        v128_t weights = wasm_v128_load(w + i);
        v128_t low = wasm_i16x8_extend_low_i8x16(weights), high = wasm_i16x8_extend_high_i8x16(weights);
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(low, wasm_v128_load(x + i)));
        sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(high, wasm_v128_load(x + i + 8)));
    }
    for (int lane = 0; lane < 4; lane++) sum += ((Signed)sums)[lane];
#endif
    for (; i < columns; i++) sum += (int32_t)(int16_t)w[i] * x[i];
    return sum;
}

static float row_int8(const Matrix *m, int64_t row, const int16_t *numbers, const float *scales) {
    float sum = 0;
    for (int64_t skip = 0; skip < m->columns; skip += BLOCK) {
        int64_t size = m->columns - skip < BLOCK ? m->columns - skip : BLOCK;
        const int8_t *w = (const int8_t *)m->data + row * m->columns + skip;
        sum = fused(scales[skip / BLOCK], (float)dot_int8(w, numbers + skip, size), sum);
    }
    return sum * m->scales[row];
}

/* `high` rows of the operand from `token` on, times the rows at ... at + wide of m. */
INLINE void tile(const Matrix *m, int64_t at, const Operand *operand, int64_t token, int high, int wide, float *out,
                 int64_t stride) {
    const float *x = operand->numbers + token * m->columns;
    if (m->kind == F32) tile_f32((const float *)m->data + at * m->columns, x, m->columns, high, wide, out, stride);
    if (m->kind == BF16)
        for (int j = 0; j < wide; j += 2) {
            const uint16_t *w = (const uint16_t *)m->data + (at + j) * m->columns;
            if (wide == 1) tile_bf16(w, x, m->columns, high, 1, out, stride);
            else tile_bf16(w, x, m->columns, high, 2, out + j, stride);
        }
    if (m->kind != INT8) return;
    for (int i = 0; i < high; i++, x += m->columns)
        for (int j = 0; j < wide; j++)
            out[i * stride + j] =
                row_int8(m, at + j, (const int16_t *)x, operand->scales + (token + i) * blocks_of(m->columns));
}

/* `wide` rows of m times all rows of the operand. */
INLINE void tiles(const Matrix *m, int64_t at, int wide, const Operand *operand, int64_t count, float *out,
                  int64_t stride) {
    int64_t t = 0;
    if (m->kind == F32)
        for (; t + HIGH_F32 <= count; t += HIGH_F32) tile(m, at, operand, t, HIGH_F32, wide, out + t * stride, stride);
    else
        for (; t + HIGH <= count; t += HIGH) tile(m, at, operand, t, HIGH, wide, out + t * stride, stride);
    for (; t + 2 <= count; t += 2) tile(m, at, operand, t, 2, wide, out + t * stride, stride);
    if (t < count) tile(m, at, operand, t, 1, wide, out + t * stride, stride);
}

/* Ask for the rows of the next tile, so that they come from memory while this one is computed. */
static inline void fetch_ahead(const Matrix *m, int64_t at) {
    int64_t row = m->columns * (m->kind == F32 ? 4 : m->kind == BF16 ? 2 : 1);
    const char *from = (const char *)m->data + at * row;
    for (int64_t i = 0; i < WIDE * row; i += 64) __builtin_prefetch(from + i, 0, 2);
}

/* out[t * stride + i] = row first + i of m times row t of the operand, for `rows` rows of m and `count` of the operand. */
static void matmul_rows(const Matrix *m, int64_t first, int64_t rows, const Operand *operand, int64_t count, float *out,
                        int64_t stride) {
    int64_t i = 0;
    /* For a single token one row at a time: with several at once a core reads a quarter less from memory. */
    if (count > 1)
        for (; i + WIDE <= rows; i += WIDE) {
            if (first + i + 2 * WIDE <= m->rows) fetch_ahead(m, first + i + WIDE);
            tiles(m, first + i, WIDE, operand, count, out + i, stride);
        }
    for (; i < rows; i++) tiles(m, first + i, 1, operand, count, out + i, stride);
}

/* Rows per task: some tasks for each thread, of a size that makes a fetch from the shared counter cheap. */
static int64_t rows_per_task(const Matrix *m, int size) {
    int64_t most = TASK / m->columns, share = m->rows / (4 * size), rows = share < most ? share : most;
    return rows < WIDE ? WIDE : rows / WIDE * WIDE;
}

typedef struct {
    Team *team;
    int me;
    float *scores; /* (longest,) */
} Thread;

/* out (T, rows of m) = m times each row of the operand; `next` is the shared counter of rows. */
static void matmul(const Thread *thread, atomic_long *next, int64_t count, const Matrix *m, const Operand *operand, float *out) {
    int64_t piece = rows_per_task(m, thread->team->size);
    for (int64_t at; (at = atomic_fetch_add(next, piece)) < m->rows;) {
        int64_t rows = at + piece < m->rows ? piece : m->rows - at;
        matmul_rows(m, at, rows, operand, count, out + at, m->rows);
    }
}

/* ---- norm, RoPE, activation ---- */

static void rms_norm(const float *x, const float *gain, int64_t size, float eps, float *out) {
    Floats squares = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = fused_lanes(load(x + i), load(x + i), squares);
    float rest = 0;
    for (; i < size; i++) rest = fused(x[i], x[i], rest);
    float scale = 1 / sqrtf((sum_of(squares) + rest) / (float)size + eps);
    for (i = 0; i < size; i++) out[i] = x[i] * scale * gain[i];
}

static void rotate(float *x, const float *angles, int64_t half) {
    const float *cosines = angles, *sines = angles + half;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = fused(first, cosines[i], -second * sines[i]);
        x[i + half] = fused(second, cosines[i], first * sines[i]);
    }
}

/* exp(x) that a compiler can vectorize, unlike the library's: 2^k times a polynomial of the remainder. */
static inline float fast_exp(float x) {
    x = x > -87 ? x < 88 ? x : 88 : -87; /* NaN becomes -87, for it cannot become an integer */
    float k = rintf(x * 1.44269504f), r = fused(k, -0.693147181f, x);
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    return (fused(p * r, r, r) + 1) * float_of_bits((uint32_t)((int32_t)k + 127) << 23);
}

/* GELU, tanh form: x (1 + tanh y) / 2 = x / (1 + exp(-2y)). */
static inline float gelu(float x) {
    return x / (1 + fast_exp(-1.5957691216f * fused(0.044715f * x * x, x, x)));
}

/* ---- the step: what all threads share, and its stages ---- */

typedef struct {
    float *x, *normed;                           /* (T, D): the residual stream, and its norm */
    float *angles[KINDS];                        /* (T, H): cosines, then sines, of each token's position */
    float *query, *key, *value, *mixed, *output; /* (T, N H), (T, K H), (T, K H), (T, N H), (T, D) */
    float *gate, *up, *down;                     /* (T, F), (T, F), (T, D) */
    Operand operand;
    float *scores; /* (threads, longest) */
} Shared;

static void embed(const Model *m, int64_t token, float *x) {
    const Matrix *e = &m->embedding;
    int64_t from = token * m->width;
    for (int64_t i = 0; i < m->width; i++) {
        float value = e->kind == F32    ? ((const float *)e->data)[from + i]
                      : e->kind == BF16 ? from_bf16(((const uint16_t *)e->data)[from + i])
                                        : (float)((const int8_t *)e->data)[from + i] * e->scales[token];
        x[i] = value * m->embedding_scale;
    }
}

static void find_angles(const Model *m, const Kind *kind, int64_t position, float *angles) {
    int64_t half = m->size / 2;
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)position / kind->factor * kind->frequencies[i];
        angles[i] = cosf(angle), angles[half + i] = sinf(angle);
    }
}

/* The first of the two floats of a layer in the page that holds a position: keys (K, H, PAGE), then values (K, PAGE, H). */
static float *page_of(const Batch *b, const Layer *l, int64_t row, int64_t position) {
    const Pages *pages = &b->pages[l->kind];
    return pages->memory + pages->table[row * (b->longest / PAGE) + position / PAGE] * pages->floats + l->offset;
}

/* Norm and RoPE of one head of one token; keys and values are written into the KV cache. */
static void norm_and_rotate_head(const Model *m, const Layer *l, const Batch *b, const Shared *s, int64_t item) {
    int64_t all = m->heads + m->groups, token = item / all, head = item % all, size = m->size;
    const float *angles = s->angles[l->kind] + token * size;
    if (head < m->heads) {
        float *query = s->query + (token * m->heads + head) * size;
        rms_norm(query, l->query_norm, size, m->eps, query);
        rotate(query, angles, size / 2);
        for (int64_t i = 0; i < size; i++) query[i] *= m->query_scale;
        return;
    }
    int64_t group = head - m->heads, position = b->positions[token], slot = position % PAGE;
    float *key = s->key + (token * m->groups + group) * size;
    rms_norm(key, l->key_norm, size, m->eps, key);
    rotate(key, angles, size / 2);
    float *page = page_of(b, l, b->row[token], position);
    float *keys = page + group * size * PAGE, *values = page + (m->groups + group) * size * PAGE;
    for (int64_t i = 0; i < size; i++) keys[i * PAGE + slot] = key[i];
    memcpy(values + slot * size, s->value + (token * m->groups + group) * size, (size_t)size * sizeof(float));
}

enum { PARTS = PAGE / LANES }; /* vectors of a page's scores */

/* Scores of one query and the keys (H, PAGE) of a page. */
static inline void score_page(const float *query, const float *keys, int64_t size, float *scores) {
    Floats sum[4][PARTS] = {0};
    for (int64_t i = 0; i + 4 <= size; i += 4)
        UNROLL for (int chain = 0; chain < 4; chain++) UNROLL for (int part = 0; part < PARTS; part++)
            sum[chain][part] = fused_lanes(fill(query[i + chain]), load(keys + (i + chain) * PAGE + part * LANES),
                                           sum[chain][part]);
    if (size % 4) /* H is even */
        UNROLL for (int chain = 0; chain < 2; chain++) UNROLL for (int part = 0; part < PARTS; part++)
            sum[chain][part] =
                fused_lanes(fill(query[size - 2 + chain]), load(keys + (size - 2 + chain) * PAGE + part * LANES),
                            sum[chain][part]);
    UNROLL for (int part = 0; part < PARTS; part++) {
        Floats total = (sum[0][part] + sum[1][part]) + (sum[2][part] + sum[3][part]);
        memcpy(scores + part * LANES, &total, sizeof total);
    }
}

enum { COLUMNS = 4 * LANES }; /* of the values, that are summed at once */

/* out (H,) = the values of positions first ... last, times their weights. */
static void sum_values(const Batch *b, const Layer *l, int64_t row, int64_t group, int64_t groups, int64_t size,
                       int64_t first, int64_t last, const float *weights, float *out) {
    int64_t start = first / PAGE * PAGE;
    for (int64_t column = 0; column < size; column += COLUMNS) {
        int64_t left = size - column;
        Floats sum[4] = {0};
        float rest[COLUMNS] = {0};
        for (int64_t from = first; from <= last; from = from / PAGE * PAGE + PAGE) {
            const float *values = page_of(b, l, row, from) + (groups + group) * size * PAGE + column;
            int64_t end = from / PAGE * PAGE + PAGE - 1;
            for (int64_t p = from; p <= (end < last ? end : last); p++) {
                const float *value = values + p % PAGE * size;
                float weight = weights[p - start];
                if (left >= COLUMNS)
                    UNROLL for (int i = 0; i < 4; i++)
                        sum[i] = fused_lanes(fill(weight), load(value + i * LANES), sum[i]);
                else
                    for (int64_t i = 0; i < left; i++) rest[i] = fused(weight, value[i], rest[i]);
            }
        }
        if (left >= COLUMNS) memcpy(out + column, sum, sizeof sum);
        else memcpy(out + column, rest, (size_t)left * sizeof *rest);
    }
}

/* Attention of one head of one token over the positions that it sees. */
static void attend_head(const Model *m, const Layer *l, const Batch *b, const Shared *s, int64_t item, float *scores) {
    int64_t token = item / m->heads, head = item % m->heads, group = head / (m->heads / m->groups), size = m->size;
    int64_t row = b->row[token], last = b->positions[token], window = m->kinds[l->kind].window;
    int64_t first = window && last >= window ? last - window + 1 : 0, start = first / PAGE * PAGE;
    const float *query = s->query + item * size;
    float *out = s->mixed + item * size;
    for (int64_t p = start; p <= last; p += PAGE)
        score_page(query, page_of(b, l, row, p) + group * size * PAGE, size, scores + p - start);
    float most = scores[first - start];
    for (int64_t p = first; p <= last; p++) most = scores[p - start] > most ? scores[p - start] : most;
    for (int64_t p = first; p <= last; p++) {
        float below = scores[p - start] - most;
        scores[p - start] = fast_exp(below) + (below - below); /* NaN where a score is not finite */
    }
    for (int64_t p = start; p < first; p++) scores[p - start] = 0;
    for (int64_t p = last + 1; p % PAGE; p++) scores[p - start] = 0;
    Floats totals = {0};
    for (int64_t p = start; p <= last; p += LANES) totals += load(scores + p - start);
    float total = sum_of(totals);
    sum_values(b, l, row, group, m->groups, size, first, last, scores, out);
    for (int64_t i = 0; i < size; i++) out[i] /= total;
}

/* Add a branch to the residual stream, and norm the stream for the matrix that reads it next. */
static void add_and_norm(const Model *m, const Shared *s, int64_t token, const float *branch, const float *gain,
                         const float *next_gain, int64_t kind) {
    float *x = s->x + token * m->width, *normed = s->normed + token * m->width;
    if (branch) {
        rms_norm(branch + token * m->width, gain, m->width, m->eps, normed);
        for (int64_t i = 0; i < m->width; i++) x[i] += normed[i];
    }
    rms_norm(x, next_gain, m->width, m->eps, normed);
    prepare_operand(kind, normed, m->width, token, &s->operand);
}

/* Each thread has every size-th token of the loop's body. */
#define EACH_TOKEN(t, count) for (int64_t t = thread->me; t < (count); t += thread->team->size)

enum { COUNTERS = 8 }; /* per layer */

static void attention_and_mlp(const Model *m, const Layer *l, const Batch *b, const Shared *s, const Thread *thread,
                              atomic_long *next) {
    int64_t count = b->count, mixed = m->heads * m->size;
    matmul(thread, next++, count, &l->query, &s->operand, s->query);
    matmul(thread, next++, count, &l->key, &s->operand, s->key);
    matmul(thread, next++, count, &l->value, &s->operand, s->value);
    barrier(thread->team);
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < count * (m->heads + m->groups);)
        norm_and_rotate_head(m, l, b, s, item);
    next++;
    barrier(thread->team);
    for (int64_t item; (item = atomic_fetch_add(next, 1)) < count * m->heads;)
        attend_head(m, l, b, s, item, thread->scores);
    next++;
    barrier(thread->team);
    EACH_TOKEN(t, count) prepare_operand(l->output.kind, s->mixed + t * mixed, mixed, t, &s->operand);
    barrier(thread->team);
    matmul(thread, next++, count, &l->output, &s->operand, s->output);
    barrier(thread->team);
    EACH_TOKEN(t, count) add_and_norm(m, s, t, s->output, l->post_attention, l->pre_mlp, l->gate.kind);
    barrier(thread->team);
    int64_t piece = rows_per_task(&l->gate, thread->team->size);
    for (int64_t at; (at = atomic_fetch_add(next, piece)) < m->inner;) {
        int64_t rows = at + piece < m->inner ? piece : m->inner - at;
        matmul_rows(&l->gate, at, rows, &s->operand, count, s->gate + at, m->inner);
        matmul_rows(&l->up, at, rows, &s->operand, count, s->up + at, m->inner);
        for (int64_t t = 0; t < count; t++) {
            float *gate = s->gate + t * m->inner + at, *up = s->up + t * m->inner + at;
            for (int64_t i = 0; i < rows; i++) gate[i] = gelu(gate[i]) * up[i];
        }
    }
    next++;
    barrier(thread->team);
    EACH_TOKEN(t, count) prepare_operand(l->down.kind, s->gate + t * m->inner, m->inner, t, &s->operand);
    barrier(thread->team);
    matmul(thread, next++, count, &l->down, &s->operand, s->down);
    barrier(thread->team);
}

static void forward(const Model *m, const Batch *b, const Shared *s, const Thread *thread, atomic_long *next,
                    float *logits) {
    EACH_TOKEN(t, b->count) {
        embed(m, b->tokens[t], s->x + t * m->width);
        for (int kind = 0; kind < KINDS; kind++)
            find_angles(m, &m->kinds[kind], b->positions[t], s->angles[kind] + t * m->size);
    }
    const float *branch = NULL, *gain = NULL;
    for (int64_t i = 0; i < m->layers; i++, next += COUNTERS) {
        const Layer *l = &m->layer[i];
        EACH_TOKEN(t, b->count) add_and_norm(m, s, t, branch, gain, l->pre_attention, l->query.kind);
        barrier(thread->team);
        attention_and_mlp(m, l, b, s, thread, next);
        branch = s->down, gain = l->post_mlp;
    }
    EACH_TOKEN(i, b->outputs) {
        int64_t t = b->output[i];
        float *x = s->x + t * m->width, *normed = s->normed + t * m->width;
        rms_norm(branch + t * m->width, gain, m->width, m->eps, normed);
        for (int64_t c = 0; c < m->width; c++) x[c] += normed[c];
        rms_norm(x, m->norm, m->width, m->eps, normed);
        prepare_operand(m->head.kind, normed, m->width, i, &s->operand);
    }
    barrier(thread->team);
    matmul(thread, next, b->outputs, &m->head, &s->operand, logits);
}

/* ---- memory and checks ---- */

static float *take(float **free, int64_t count) {
    float *taken = *free;
    *free += (count + 15) / 16 * 16;
    return taken;
}

static int64_t most_columns(const Model *m) {
    int64_t most = m->heads * m->size > m->inner ? m->heads * m->size : m->inner;
    return m->width > most ? m->width : most;
}

/* Lay out the workspace; return how many floats it has. */
static int64_t lay_out(const Model *m, int64_t count, int64_t longest, float *memory, Shared *s) {
    float *free = memory;
    int64_t queries = count * m->heads * m->size, keys = count * m->groups * m->size, most = most_columns(m);
    s->x = take(&free, count * m->width), s->normed = take(&free, count * m->width);
    for (int kind = 0; kind < KINDS; kind++) s->angles[kind] = take(&free, count * m->size);
    s->query = take(&free, queries), s->key = take(&free, keys), s->value = take(&free, keys);
    s->mixed = take(&free, queries), s->output = take(&free, count * m->width);
    s->gate = take(&free, count * m->inner), s->up = take(&free, count * m->inner);
    s->down = take(&free, count * m->width);
    s->operand.numbers = take(&free, count * most), s->operand.scales = take(&free, count * blocks_of(most));
    s->scores = take(&free, m->threads * longest);
    return free - memory;
}

/* Floats that `step` needs as its workspace. */
int64_t workspace_floats(const Model *m, int64_t count, int64_t longest) {
    Shared s;
    static float nothing;
    return lay_out(m, count, longest, &nothing, &s);
}

enum { DONE, NO_MEMORY, BAD_TOKEN, BAD_POSITION, BAD_PAGE, BAD_OUTPUT };

/* Whether the pages of a kind that a token reads and writes are there. */
static int has_pages(const Batch *b, const Kind *kind, const Pages *pages, int64_t row, int64_t position) {
    if (!pages->floats) return 1; /* no layer of this kind */
    int64_t first = kind->window && position >= kind->window ? position - kind->window + 1 : 0;
    for (int64_t page = first / PAGE; page <= position / PAGE; page++) {
        int32_t number = pages->table[row * (b->longest / PAGE) + page];
        if (number < 1 || number >= pages->pages) return 0; /* nobody holds page 0 */
    }
    return 1;
}

static int check(const Model *m, const Batch *b) {
    for (int64_t t = 0; t < b->count; t++) {
        if (b->tokens[t] < 0 || b->tokens[t] >= m->embedding.rows) return BAD_TOKEN;
        if (b->row[t] < 0 || b->row[t] >= b->rows || b->positions[t] < 0 || b->positions[t] >= b->longest)
            return BAD_POSITION;
        for (int kind = 0; kind < KINDS; kind++)
            if (!has_pages(b, &m->kinds[kind], &b->pages[kind], b->row[t], b->positions[t])) return BAD_PAGE;
    }
    for (int64_t i = 0; i < b->outputs; i++)
        if (b->output[i] < 0 || b->output[i] >= b->count || (i && b->output[i] <= b->output[i - 1])) return BAD_OUTPUT;
    return DONE;
}

/* Read the tokens of a batch, write their keys and values into their pages, and the logits (outputs, V) of those that
   are wanted. `workspace` has as many floats as `workspace_floats` says. Where something in the batch is out of range,
   nothing is read or written. */
int step(const Model *m, const Batch *b, float *workspace, float *logits) {
    int wrong = check(m, b);
    if (wrong) return wrong;
    atomic_long *next = calloc((size_t)(m->layers * COUNTERS + 1), sizeof *next);
    if (!next) return NO_MEMORY;
    Shared s;
    lay_out(m, b->count, b->longest, workspace, &s);
    Team team = {.size = 1};
    Cores cores;
    int first = first_core(&cores, m->threads);
#pragma omp parallel num_threads((int)m->threads)
    {
        Thread thread = {&team, 0, s.scores};
#ifdef _OPENMP
        thread.me = omp_get_thread_num();
#pragma omp single
        team.size = omp_get_num_threads();
#endif
        thread.scores += thread.me * b->longest;
        Cores before;
        int bound = bind_core(&cores, first, thread.me, &before);
        forward(m, b, &s, &thread, next, logits);
        if (bound) restore_cores(&before);
    }
    free(next);
    return DONE;
}
