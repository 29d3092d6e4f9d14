/* Sampling on a CPU: from the logits of each row to its next token, by the rules of gemmule/inference/sampling.py.

   Every rule that narrows the choice (top-k, top-p, min-p) keeps the beginning of one order: likeliest first, of equally
   likely tokens the lowest id first. So what is kept is known by the last logit that is, and how many of the tokens that
   have it; that is found by radix selection, and nothing is sorted. The maxima of blocks of logits tell which blocks
   need not be looked at again.

   A row is the work of one thread, and sums are taken in the order that is written here: a row's result depends on that
   row alone. Sums are in double precision. library.py compiles it, sampler.py has the same structures. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* What is drawn where there is no token: logits that are not finite; nothing that may be drawn; an id beyond the
   vocabulary in a row. */
enum { INVALID = -1, NO_CANDIDATE = -2, BAD_TOKEN = -3 };
enum { BLOCK = 64, LANES = 8, BINS = 2048 };
/* Fewer logits than this are not worth waking other threads for. */
enum { WORTH_A_TEAM = 262144 };

typedef struct {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t top_k;
    const int32_t *biased; /* distinct tokens */
    const double *biases;
    int64_t bias_count;
} Settings;

typedef struct {
    const Settings *settings;
    double uniform;
    const int32_t *tokens, *counts; /* distinct tokens of prompt and reply, with their counts in the reply */
    int64_t token_count;
    const int32_t *excluded;
    int64_t excluded_count;
    const uint32_t *allowed; /* (V + 31) / 32 words, or NULL */
} Row;

typedef struct {
    int64_t row, token, count;
} Query;

/* Memory of one thread. */
typedef struct {
    double *weights, *sums, *bins; /* (V,), one per block, (BINS,) */
    float *adjusted, *values;      /* (V,) each */
    int32_t *ids;                  /* (V,) */
    float *maxima;                 /* one per block */
} Work;

/* Tokens in ascending order, with their logits. */
typedef struct {
    const float *values;
    const int32_t *ids; /* NULL: all tokens */
    int64_t count;
} Choice;

static int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }
static int64_t size_of_block(int64_t block, int64_t count) {
    return count - block * BLOCK < BLOCK ? count - block * BLOCK : BLOCK;
}

/* ---- logits as integers of the same order; 0 and -0 are equal ---- */

enum { KEY_OF_INFINITY = 0x7f800000, LOWEST = -0x7f800001 /* of minus infinity */ };

static inline int32_t key_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    return key == -1 ? 0 : key;
}
static inline float value_of(int32_t key) {
    int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

typedef struct {
    int32_t least, most;
} Range;

/* The range of the keys of x, and the largest value of each block. NaN lies beyond the infinities. */
static Range scan(const float *x, int64_t count, float *maxima) {
    Range range = {INT32_MAX, INT32_MIN};
    for (int64_t block = 0; block < blocks_of(count); block++) {
        const float *part = x + block * BLOCK;
        int64_t size = size_of_block(block, count);
        int32_t least = INT32_MAX, most = INT32_MIN;
        for (int64_t i = 0; i < size; i++) {
            int32_t key = key_of(part[i]);
            least = key < least ? key : least;
            most = key > most ? key : most;
        }
        maxima[block] = value_of(most);
        range.least = least < range.least ? least : range.least;
        range.most = most > range.most ? most : range.most;
    }
    return range;
}
static int is_invalid(Range range) {
    return range.least < LOWEST || range.most >= KEY_OF_INFINITY || range.most == LOWEST;
}

/* ---- biases, penalties, exclusions ---- */

static int is_adjusted(const Row *row) {
    const Settings *s = row->settings;
    int penalized = s->repetition != 1 || s->presence != 0 || s->frequency != 0;
    return s->bias_count > 0 || (penalized && row->token_count > 0) || row->excluded_count > 0 || row->allowed;
}

/* As a float within the range of floats. */
static float rounded(double value) {
    if (!(value > -(double)FLT_MAX)) return -FLT_MAX;
    return value > (double)FLT_MAX ? FLT_MAX : (float)value;
}

static float penalize(const Settings *s, float x, int32_t count) {
    if (s->repetition != 1) x = rounded(x > 0 ? x / s->repetition : x * s->repetition);
    if (count > 0) x = rounded(x - s->presence);
    return rounded(x - s->frequency * count);
}

/* Writes the logits to draw from; returns whether all tokens are below V. */
static int adjust(const Row *row, const float *x, int64_t vocabulary, float *out) {
    const Settings *s = row->settings;
    if (row->allowed)
        for (int64_t i = 0; i < vocabulary; i++)
            out[i] = (row->allowed[i / 32] >> (i % 32)) & 1 ? x[i] : -INFINITY;
    else
        memcpy(out, x, (size_t)vocabulary * sizeof *out);
    for (int64_t i = 0; i < s->bias_count; i++) {
        int64_t token = s->biased[i];
        if (token < 0 || token >= vocabulary) return 0;
        if (out[token] > -INFINITY) out[token] = rounded(out[token] + s->biases[i]);
    }
    for (int64_t i = 0; i < row->token_count; i++) {
        int64_t token = row->tokens[i];
        if (token < 0 || token >= vocabulary) return 0;
        if (out[token] > -INFINITY) out[token] = penalize(s, out[token], row->counts[i]);
    }
    for (int64_t i = 0; i < row->excluded_count; i++) {
        int64_t token = row->excluded[i];
        if (token < 0 || token >= vocabulary) return 0;
        out[token] = -INFINITY;
    }
    return 1;
}

/* ---- weights: exp((logit - highest) / temperature) ---- */

/* exp(x) for x <= 0, of which those below the smallest normal number become 0: 2^k times the Taylor polynomial of the
   remainder, which errs by less than a rounding. In a form that a compiler can vectorize. */
static inline double exp_of(double x) {
    const double rounder = 0x1.8p52; /* added to a small number, it leaves the nearest integer in the lowest bits */
    double safe = x < -708 ? -708 : x, shifted = safe * 0x1.71547652b82fep0 + rounder, k = shifted - rounder;
    double r = safe - k * 0x1.62e42feep-1 - k * 0x1.a39ef35793c76p-33; /* ln 2 in two parts; the first product is exact */
    double p = 1.0 / 6227020800;
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1;
    p = p * r + 1;
    uint64_t bits, power;
    memcpy(&bits, &p, sizeof bits);
    memcpy(&power, &shifted, sizeof power);
    bits += power << 52;
    memcpy(&p, &bits, sizeof p);
    return x < -708 ? 0 : p;
}

typedef struct {
    double highest, temperature, inverse;
} Scale;

static Scale scale_of(int32_t highest, double temperature) {
    double limited = temperature < 1e-37 ? 1e-37 : temperature < 1e300 ? temperature : 1e300;
    return (Scale){value_of(highest), limited, 1 / limited};
}

static void weigh(const float *values, int64_t count, const Scale *scale, double *weights) {
    double highest = scale->highest, inverse = scale->inverse;
    for (int64_t i = 0; i < count; i++) weights[i] = exp_of((values[i] - highest) * inverse);
}

/* In the order of eight running sums. */
static double sum_of(const double *weights, int64_t count) {
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++) lanes[lane] += weights[i + lane];
    for (; i < count; i++) lanes[i % LANES] += weights[i];
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/* The sum of all weights; `sums` gets that of each block. */
static double total_of(const Choice *choice, const Scale *scale, double *sums) {
    double weights[BLOCK], total = 0;
    for (int64_t block = 0; block < blocks_of(choice->count); block++) {
        int64_t size = size_of_block(block, choice->count);
        weigh(choice->values + block * BLOCK, size, scale, weights);
        sums[block] = sum_of(weights, size);
        total += sums[block];
    }
    return total;
}

/* The first token at which the running sum of weights exceeds `uniform` times their sum. */
static int64_t find_token(const Choice *choice, const Scale *scale, double uniform, double *sums) {
    double weights[BLOCK], total = total_of(choice, scale, sums), reached = 0;
    /* Below the total, so that a block is always found. */
    double target = total * (uniform < 0 ? 0 : uniform < 1 ? uniform : 1 - 0x1p-53);
    int64_t block = 0, found = 0;
    for (; block + 1 < blocks_of(choice->count) && reached + sums[block] <= target; block++) reached += sums[block];
    weigh(choice->values + block * BLOCK, size_of_block(block, choice->count), scale, weights);
    for (int64_t i = 0; i < size_of_block(block, choice->count); i++) {
        if (weights[i] > 0) found = block * BLOCK + i; /* the last one of the block where rounding leaves none */
        reached += weights[i];
        if (reached > target) break;
    }
    return choice->ids ? choice->ids[found] : found;
}

/* ---- the beginning of the order by likelihood ---- */

/* The least key that is kept, and how many of the tokens that have it. */
typedef struct {
    int32_t key;
    int64_t ties;
} Last;

/* Keep the smallest beginning whose weights reach `budget`; without weights each is 1. All keys are at least `low` and
   at most `high`. Each round divides the range of keys into bins and continues in the bin where the sum is reached. */
static Last select_last(const float *values, const double *weights, int64_t count, int32_t low, int32_t high,
                        double budget, double *bins) {
    double above = 0; /* the weights of all keys above `high` */
    for (;;) {
        uint32_t base = (uint32_t)low, span = (uint32_t)high - base;
        int shift = 0;
        while (span >> shift >= BINS) shift++;
        memset(bins, 0, (size_t)((span >> shift) + 1) * sizeof *bins);
        for (int64_t i = 0; i < count; i++) {
            int32_t key = key_of(values[i]);
            if (key >= low && key <= high) bins[((uint32_t)key - base) >> shift] += weights ? weights[i] : 1;
        }
        int64_t bin = span >> shift;
        for (; bin >= 0 && above + bins[bin] < budget; bin--) above += bins[bin];
        if (bin < 0) return (Last){low, count};
        low = (int32_t)(low + (bin << shift));
        high = (int32_t)(low + ((int64_t)1 << shift) - 1);
        if (shift) continue;
        Last last = {low, 0};
        for (int64_t i = 0; i < count && above < budget; i++)
            if (key_of(values[i]) == low) last.ties++, above += weights ? weights[i] : 1;
        return last;
    }
}

/* The least key whose scaled distance from the highest logit is at least `distance`, a number up to 0. The comparison is
   that of sampling.py, so that they agree on a token that lies exactly there. */
static int32_t key_at_distance(const Scale *scale, double distance) {
    int64_t low = LOWEST + 1, high = key_of((float)scale->highest);
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        double value = value_of((int32_t)middle);
        int near = scale->temperature == 1 ? value >= scale->highest + distance
                                           : (value - scale->highest) / scale->temperature >= distance;
        if (near) high = middle;
        else low = middle + 1;
    }
    return (int32_t)high;
}

/* The tokens with at least this key, of a vocabulary whose blocks have these maxima. */
static Choice gather(const float *x, int64_t vocabulary, int32_t least, const Work *work) {
    int64_t kept = 0;
    for (int64_t block = 0; block < blocks_of(vocabulary); block++) {
        if (key_of(work->maxima[block]) < least) continue;
        for (int64_t i = block * BLOCK; i < block * BLOCK + size_of_block(block, vocabulary); i++) {
            /* In any case, and overwritten: kept is at most i. */
            work->values[kept] = x[i], work->ids[kept] = (int32_t)i;
            kept += key_of(x[i]) >= least;
        }
    }
    return (Choice){work->values, work->ids, kept};
}

/* What is left of a choice that `gather` made. */
static Choice narrow(const Choice *choice, Last last, const Work *work) {
    int64_t kept = 0;
    for (int64_t i = 0; i < choice->count; i++) {
        int32_t key = key_of(choice->values[i]);
        int tie = key == last.key;
        work->values[kept] = choice->values[i], work->ids[kept] = choice->ids[i];
        kept += (key > last.key) | (tie & (last.ties > 0));
        last.ties -= tie;
    }
    return (Choice){work->values, work->ids, kept};
}

/* The k likeliest tokens, of those with at least the key `least`. */
static Choice keep_k(const float *x, int64_t vocabulary, int64_t k, int32_t least, int32_t highest, const Work *work) {
    int64_t blocks = blocks_of(vocabulary);
    /* k blocks have a maximum of at least this, so k tokens do. */
    if (k <= blocks) {
        int32_t key = select_last(work->maxima, NULL, blocks, LOWEST, highest, (double)k, work->bins).key;
        least = key > least ? key : least;
    }
    Choice choice = gather(x, vocabulary, least, work);
    if (choice.count <= k) return choice;
    return narrow(&choice, select_last(choice.values, NULL, choice.count, least, highest, (double)k, work->bins), work);
}

/* The smallest set of likeliest tokens that reaches probability p. */
static Choice keep_p(const Choice *given, double p, const Scale *scale, const Work *work) {
    double total = total_of(given, scale, work->sums);
    /* All tokens that are less likely than this would together not have the rest. By half, to be sure of it. */
    double distance = log((1 - p) * total / (double)given->count / 2);
    int32_t least = key_at_distance(scale, distance);
    Choice choice = given->ids ? narrow(given, (Last){least, given->count}, work)
                               : gather(given->values, given->count, least, work);
    weigh(choice.values, choice.count, scale, work->weights);
    int32_t highest = key_of((float)scale->highest);
    return narrow(&choice, select_last(choice.values, work->weights, choice.count, least, highest, p * total, work->bins),
                  work);
}

/* ---- rows ---- */

static int64_t find_key(const float *x, int64_t vocabulary, int32_t key, const float *maxima) {
    int64_t i = 0;
    while (key_of(maxima[i / BLOCK]) != key) i += BLOCK;
    while (i + 1 < vocabulary && key_of(x[i]) != key) i++;
    return i;
}

static int64_t draw_row(const float *x, int64_t vocabulary, const Row *row, const Work *work) {
    const Settings *s = row->settings;
    Range range = scan(x, vocabulary, work->maxima);
    if (is_invalid(range)) return INVALID;
    if (is_adjusted(row)) {
        if (!adjust(row, x, vocabulary, work->adjusted)) return BAD_TOKEN;
        x = work->adjusted;
        range = scan(x, vocabulary, work->maxima);
        if (range.most == LOWEST) return NO_CANDIDATE;
    }
    if (!(s->temperature > 0)) return find_key(x, vocabulary, range.most, work->maxima);
    Scale scale = scale_of(range.most, s->temperature);
    int by_k = s->top_k > 0 && s->top_k < vocabulary, by_p = s->top_p > 0 && s->top_p < 1, by_min_p = s->min_p > 0;
    int32_t least = by_min_p ? key_at_distance(&scale, log(s->min_p)) : LOWEST + 1;
    Choice choice = {x, NULL, vocabulary};
    /* Where top-p is between them, min-p must not be applied with top-k, for it would change the sum. */
    if (by_k) choice = keep_k(x, vocabulary, s->top_k, by_p ? LOWEST + 1 : least, range.most, work);
    else if (by_min_p && !by_p) choice = gather(x, vocabulary, least, work);
    if (by_p) choice = keep_p(&choice, s->top_p, &scale, work);
    if (by_p && by_min_p) choice = narrow(&choice, (Last){least, choice.count}, work);
    return find_token(&choice, &scale, row->uniform, work->sums);
}

/* ---- memory and threads ---- */

static int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static void *take(char **left, int64_t bytes) {
    void *taken = *left;
    *left += padded(bytes);
    return taken;
}

/* Bytes of memory that `threads` threads need for a vocabulary. */
int64_t workspace_bytes(int64_t vocabulary, int64_t threads) {
    int64_t blocks = blocks_of(vocabulary);
    return threads * (padded(vocabulary * 8) + padded(blocks * 8) + padded(BINS * 8) + 3 * padded(vocabulary * 4) +
                      padded(blocks * 4));
}
static Work work_of(char *workspace, int64_t vocabulary) {
#ifdef _OPENMP
    workspace += workspace_bytes(vocabulary, omp_get_thread_num());
#endif
    int64_t blocks = blocks_of(vocabulary);
    Work work;
    work.weights = take(&workspace, vocabulary * 8);
    work.sums = take(&workspace, blocks * 8);
    work.bins = take(&workspace, BINS * 8);
    work.adjusted = take(&workspace, vocabulary * 4);
    work.values = take(&workspace, vocabulary * 4);
    work.ids = take(&workspace, vocabulary * 4);
    work.maxima = take(&workspace, blocks * 4);
    return work;
}

static int team_size(int64_t vocabulary, int64_t items, int64_t threads) {
    if (items * vocabulary < WORTH_A_TEAM) return 1;
    return (int)(items < threads ? items : threads);
}

/* Draw a token of each of `count` rows; row i has its logits (V,) at logits + i * stride. */
void draw_rows(const float *logits, int64_t stride, int64_t vocabulary, const Row *rows, int64_t count, int64_t *drawn,
               char *workspace, int64_t threads) {
    int team = team_size(vocabulary, count, threads);
#pragma omp parallel for schedule(dynamic) num_threads(team) if (team > 1)
    for (int64_t row = 0; row < count; row++) {
        Work work = work_of(workspace, vocabulary);
        drawn[row] = draw_row(logits + row * stride, vocabulary, rows + row, &work);
    }
    (void)team;
}

/* Log-probabilities by the distribution of the logits themselves: of the token of a query, and of the `count` likeliest,
   likeliest first. Returns how many there are. */
static int64_t answer(const float *x, int64_t vocabulary, const Query *query, double *log_probability, int32_t *ids,
                      double *values, const Work *work) {
    if (query->token < 0 || query->token >= vocabulary) return BAD_TOKEN;
    Range range = scan(x, vocabulary, work->maxima);
    *log_probability = NAN;
    if (is_invalid(range)) return 0;
    Scale scale = scale_of(range.most, 1);
    Choice choice = {x, NULL, vocabulary};
    double rest = log(total_of(&choice, &scale, work->sums));
    *log_probability = (x[query->token] - scale.highest) - rest;
    if (query->count <= 0) return 0;
    choice = keep_k(x, vocabulary, query->count, LOWEST + 1, range.most, work);
    for (int64_t i = 0; i < choice.count; i++) {
        double value = (choice.values[i] - scale.highest) - rest;
        int64_t at = i;
        for (; at > 0 && values[at - 1] < value; at--) ids[at] = ids[at - 1], values[at] = values[at - 1];
        ids[at] = choice.ids[i], values[at] = value;
    }
    return choice.count;
}

/* Answer queries on rows of logits; `ids` and `values` are (queries, most), and a query's count is at most that. */
void log_probabilities(const float *logits, int64_t stride, int64_t vocabulary, int64_t rows, const Query *queries,
                       int64_t count, int64_t most, double *tokens, int32_t *ids, double *values, int64_t *found,
                       char *workspace, int64_t threads) {
    int team = team_size(vocabulary, count, threads);
#pragma omp parallel for schedule(dynamic) num_threads(team) if (team > 1)
    for (int64_t i = 0; i < count; i++) {
        Work work = work_of(workspace, vocabulary);
        Query query = queries[i];
        query.count = query.count < most ? query.count : most;
        found[i] = query.row < 0 || query.row >= rows
                       ? BAD_TOKEN
                       : answer(logits + query.row * stride, vocabulary, &query, tokens + i, ids + i * most,
                                values + i * most, &work);
    }
    (void)team;
}
