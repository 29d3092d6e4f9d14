/* Continue a text with a Gemma 3 of Gemmule: one program, without a library, from a packed file.

   The forward pass is the engine's own step.c, sampling its sample.c (by draw.c), and a seed draws what
   `gemmule generate` draws with it. The packed file is named, or lies at the end of the program itself.
   Build: cc -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -o story story.c draw.c system.c -lm */

#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#define _FILE_OFFSET_BITS 64
#if defined(_WIN32)
#include <sched.h>
#define sched_yield() 0 /* there is one thread; the function is in a library of its own */
#endif
#include "step.c"

#include "draw.h"
#include "packed.h"
#include "system.h"
#include "vocabulary.h"

#include <errno.h>
#include <time.h>
static Text read_input(void) {
    Text text = {0};
    char part[65536];
    add_bytes(&text, "", 0);
    for (size_t count; (count = fread(part, 1, sizeof part, stdin));) add_bytes(&text, part, (int64_t)count);
    return text;
}

/* ---- the number that draws token `index`: BLAKE2b (RFC 7693) of seed, sample and index, as in sampling.py ---- */

static void mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    static const int bits[4] = {32, 24, 16, 63};
    for (int half = 0; half < 2; half++) {
        v[a] += v[b] + (half ? y : x), v[d] ^= v[a], v[d] = v[d] >> bits[2 * half] | v[d] << (64 - bits[2 * half]);
        v[c] += v[d], v[b] ^= v[c], v[b] = v[b] >> bits[2 * half + 1] | v[b] << (64 - bits[2 * half + 1]);
    }
}

static double uniform(uint64_t seed, uint64_t index) {
    static const uint8_t order[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
    };
    uint64_t v[16] = {
        0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
        0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179,
    };
    uint64_t message[16] = {seed, 0, index};
    memcpy(v + 8, v, 8 * sizeof *v);
    /* Eight bytes of digest, no key; personalized as "gemmule-sampling"; 24 bytes in one block, the last one. */
    v[0] ^= 0x01010008;
    v[6] ^= number_at((const uint8_t *)"gemmule-", 8), v[7] ^= number_at((const uint8_t *)"sampling", 8);
    uint64_t first = v[0];
    v[12] ^= 24, v[14] = ~v[14];
    for (int round = 0; round < 12; round++) {
        const uint8_t *o = order[round % 10];
        for (int i = 0; i < 4; i++) mix(v, i, 4 + i, 8 + i, 12 + i, message[o[2 * i]], message[o[2 * i + 1]]);
        for (int i = 0; i < 4; i++)
            mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, message[o[8 + 2 * i]], message[o[9 + 2 * i]]);
    }
    return (double)((first ^ v[0] ^ v[8]) >> 11) * 0x1p-53;
}

/* ---- the model and its KV cache ---- */

enum { CHUNK = 64 /* tokens of a prompt that are read at once */ };

typedef struct {
    Model model;
    Batch batch;
    float *workspace, *logits; /* logits (CHUNK, V), or (1, V) */
} Reader;

/* A reader of up to `positions` tokens, which gives the logits of at most `outputs` at once. */
static Reader begin(const Model *model, int64_t positions, int64_t outputs) {
    Reader reader = {.model = *model};
    Batch *b = &reader.batch;
    b->rows = 1, b->longest = (positions + PAGE - 1) / PAGE * PAGE;
    int64_t pages = b->longest / PAGE, layers[KINDS] = {0};
    for (int64_t i = 0; i < model->layers; i++) layers[model->layer[i].kind]++;
    for (int kind = 0; kind < KINDS; kind++) {
        /* Behind the window pages are used again. */
        int64_t window = model->kinds[kind].window, used = pages;
        if (window && window < b->longest && (window + CHUNK) / PAGE + 2 < pages) used = (window + CHUNK) / PAGE + 2;
        int32_t *table = allocate(pages, sizeof *table);
        for (int64_t i = 0; i < pages; i++) table[i] = (int32_t)(1 + i % used);
        int64_t floats = layers[kind] * 2 * model->groups * model->size * PAGE;
        b->pages[kind] = (Pages){allocate(used + 1, (uint64_t)floats * sizeof(float)), used + 1, floats, table};
    }
    reader.workspace = allocate(workspace_floats(model, CHUNK, b->longest), sizeof(float));
    reader.logits = allocate(outputs * model->head.rows, sizeof(float));
    return reader;
}

/* Read tokens at the positions from `first` on, at most CHUNK; logits of all of them, or of the last alone. */
static void read_tokens(Reader *reader, const int64_t *tokens, int64_t first, int64_t count, int all) {
    int64_t positions[CHUNK], rows[CHUNK] = {0}, output[CHUNK];
    for (int64_t i = 0; i < count; i++) positions[i] = first + i, output[i] = all ? i : count - 1;
    Batch *b = &reader->batch;
    b->count = count, b->tokens = tokens, b->positions = positions, b->row = rows;
    b->outputs = all ? count : 1, b->output = output;
    int wrong = step(&reader->model, b, reader->workspace, reader->logits);
    if (wrong) fail(wrong == NO_MEMORY ? "there is no memory for a step" : "a token is out of range");
}

/* ---- options ---- */

enum { MOST_STOPS = 64 };

typedef struct {
    const char *file, *prompt, *stops[MOST_STOPS];
    int stop_count, ids, encode, logits; /* the last three are for `gemmule export --verify` */
    int64_t tokens;
    uint64_t seed;
    Sampling sampling;
} Options;

static const char *const HELP =
    "Usage: %s [MODEL] [options]\n\n"
    "Continue a text. MODEL is a packed file of `gemmule export`; a program that has one at its end needs none.\n\n"
    "  --prompt TEXT     the text to continue; - reads it from standard input [Once upon a time]\n"
    "  --tokens N        maximum number of tokens to generate [256]\n"
    "  --temperature X   above 1 flattens the distribution; 0 takes the likeliest token [0.7]\n"
    "  --top-k N         keep the N likeliest tokens; 0 keeps all [0]\n"
    "  --top-p X         keep the likeliest tokens that together reach this probability [1]\n"
    "  --min-p X         keep tokens at least this likely, as a share of the likeliest one [0.1]\n"
    "  --seed N          draw the same tokens again, as `gemmule generate --seed N` does [random]\n"
    "  --stop TEXT       a text before which to stop (repeatable)\n"
    "  --help            show this\n";

static double number_of(const char *option, const char *text, double least, double most, int whole) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most) || (whole && value != floor(value)))
        fail("%s %s: must be %s from %g to %g", option, text, whole ? "a whole number" : "a number", least, most);
    return value;
}

static uint64_t seed_of(const char *text) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno) fail("--seed %s: must be a whole number from 0 to 2^64 - 1", text);
    return value;
}

static void set_option(Options *options, const char *name, const char *value) {
    Sampling *s = &options->sampling;
    if (!strcmp(name, "--prompt")) options->prompt = value;
    else if (!strcmp(name, "--tokens")) options->tokens = (int64_t)number_of(name, value, 1, 1e9, 1);
    else if (!strcmp(name, "--temperature")) s->temperature = number_of(name, value, 0, 1e300, 0);
    else if (!strcmp(name, "--top-k")) s->top_k = (int64_t)number_of(name, value, 0, 1e9, 1);
    else if (!strcmp(name, "--top-p")) s->top_p = number_of(name, value, 1e-300, 1, 0);
    else if (!strcmp(name, "--min-p")) s->min_p = number_of(name, value, 0, 1 - 0x1p-53, 0);
    else if (!strcmp(name, "--seed")) options->seed = seed_of(value);
    else if (!strcmp(name, "--stop") && *value && options->stop_count < MOST_STOPS)
        options->stops[options->stop_count++] = value;
    else if (!strcmp(name, "--stop")) fail("--stop: needs a text, and is given at most %d times", MOST_STOPS);
    else fail("%s: no such option; see --help", name);
}

static Options read_options(int count, char **arguments) {
    Options options = {.prompt = "Once upon a time", .tokens = 256, .sampling = {0.7, 1, 0.1, 0}};
    options.seed = (uint64_t)time(NULL) * 0x9e3779b97f4a7c15u ^ (uint64_t)clock();
    for (int i = 1; i < count; i++) {
        char *name = arguments[i], *value = strchr(name, '=');
        if (!strcmp(name, "--help") || !strcmp(name, "-h")) {
            printf(HELP, program);
            exit(0);
        }
        if (!strcmp(name, "--ids")) options.ids = 1;
        else if (!strcmp(name, "--encode")) options.encode = 1;
        else if (!strcmp(name, "--logits")) options.logits = 1;
        else if (strncmp(name, "--", 2)) {
            if (options.file)
                fail("%s: one packed file is read, and %s is named already; a text is given by --prompt", name,
                     options.file);
            options.file = name;
        } else if (value) {
            *value = 0;
            set_option(&options, name, value + 1);
        } else if (i + 1 < count) set_option(&options, name, arguments[i + 1]), i++;
        else fail("%s: needs a value; see --help", name);
    }
    return options;
}

/* ---- generation ---- */

/* How much of the end of a text could begin a stop string; or for a complete one, minus the length of the longest. */
static int64_t stop_at(const Options *options, const char *text, int64_t size) {
    int64_t begun = 0, complete = 0;
    for (int i = 0; i < options->stop_count; i++) {
        int64_t length = (int64_t)strlen(options->stops[i]);
        for (int64_t part = length < size ? length : size; part > 0; part--) {
            if (memcmp(text + size - part, options->stops[i], (size_t)part)) continue;
            if (part == length && part > complete) complete = part;
            if (part > begun) begun = part;
            break;
        }
    }
    return complete ? -complete : begun;
}

/* Print the new part of a reply, except what could begin a stop string; returns whether one is complete. */
static int show(const Options *options, const Text *text, int64_t *seen, int64_t *shown, int at_end) {
    int64_t until = text->count, held = 0;
    int stopped = 0;
    for (; options->stop_count && !stopped && *seen < text->count; ++*seen) {
        held = stop_at(options, text->bytes, *seen + 1);
        if (held < 0) stopped = 1, until = *seen + 1 + held;
    }
    if (!stopped && !at_end && options->stop_count) until -= stop_at(options, text->bytes, text->count);
    if (until > *shown) fwrite(text->bytes + *shown, 1, (size_t)(until - *shown), stdout);
    *shown = until > *shown ? until : *shown;
    fflush(stdout);
    return stopped;
}

static int is_stop(const Packed *packed, int64_t token) {
    const char *text = find_entry(packed, "stops");
    while (*text == '[' || *text == ',') {
        char *end;
        if (strtod(text + 1, &end) == (double)token && end > text + 1) return 1;
        text = end;
    }
    return 0;
}

static void generate(const Options *options, const Packed *packed, const Model *model, const Vocabulary *v) {
    Text given = {0}, bytes = {0}, reply = {0};
    add_bytes(&given, "", 0), add_bytes(&bytes, "", 0), add_bytes(&reply, "", 0);
    if (!strcmp(options->prompt, "-")) {
        Text input = read_input();
        int64_t first = input.count >= 3 && !memcmp(input.bytes, "\xef\xbb\xbf", 3) ? 3 : 0; /* a byte order mark */
        for (int64_t i = first; i < input.count; i++)
            if (input.bytes[i] != '\r' || i + 1 == input.count || input.bytes[i + 1] != '\n')
                add_bytes(&given, input.bytes + i, 1);
        if (given.count && given.bytes[given.count - 1] == '\n') given.count--;
    } else add_bytes(&given, options->prompt, (int64_t)strlen(options->prompt));
    for (int64_t i = 0; i < given.count;) {
        uint32_t point;
        int needed, length = character_at((const uint8_t *)given.bytes + i, given.count - i, &point, &needed);
        if (!length) fail("the prompt is not UTF-8 text: byte %lld of it", (long long)i);
        i += length;
    }
    Tokens tokens = encode(v, given.bytes, given.count);
    int64_t longest = find_whole(packed, "max_position_embeddings", -1, 1, 9007199254740992);
    if (!tokens.count) fail("the prompt is empty, and this model begins no text with bos: give it a word");
    if (tokens.count >= longest)
        fail("the prompt has %lld tokens; this model's max_position_embeddings is %lld", (long long)tokens.count,
             (long long)longest);
    int64_t most = options->tokens < longest - tokens.count ? options->tokens : longest - tokens.count;
    Reader reader = begin(model, tokens.count + most - 1, 1);
    char *workspace = allocate(draw_bytes(v->size), 1);
    if (!options->ids) fwrite(given.bytes, 1, (size_t)given.count, stdout), fflush(stdout);
    int64_t seen = 0, shown = 0, read = 0, prompt = tokens.count;
    for (int64_t i = 0; i < most; i++) {
        for (int64_t count; (count = tokens.count - read) > 0; read += count) {
            count = count < CHUNK ? count : CHUNK;
            read_tokens(&reader, tokens.ids + read, read, count, 0);
        }
        double number = uniform(options->seed, (uint64_t)i);
        int64_t token = draw_token(reader.logits, v->size, &options->sampling, number, workspace);
        if (token < 0) fail("%s: the model's logits are not finite, so its weights are damaged", packed->name);
        append(&tokens, token);
        if (is_stop(packed, token)) break;
        add_bytes(&bytes, v->token_texts + v->token_starts[token], v->token_starts[token + 1] - v->token_starts[token]);
        decode(&bytes, &reply, 0);
        if (!options->ids && show(options, &reply, &seen, &shown, 0)) {
            bytes.count = 0, shown = reply.count;
            break;
        }
    }
    decode(&bytes, &reply, 1);
    if (!options->ids && shown < reply.count) show(options, &reply, &seen, &shown, 1);
    for (int64_t i = prompt; options->ids && i < tokens.count; i++) printf("%lld ", (long long)tokens.ids[i]);
    putchar('\n');
}

/* ---- for `gemmule export --verify` ---- */

/* Encode the texts of standard input, each ended by a zero: a line of ids for each. */
static void encode_input(const Vocabulary *v) {
    Text input = read_input();
    for (int64_t start = 0, end; start < input.count; start = end + 1) {
        for (end = start; end < input.count && input.bytes[end]; end++) {}
        Tokens tokens = encode(v, input.bytes + start, end - start);
        for (int64_t i = 0; i < tokens.count; i++) printf("%lld ", (long long)tokens.ids[i]);
        putchar('\n');
        free(tokens.ids);
    }
}

/* Write the logits (T, V) of the ids in standard input as fp32, little-endian. */
static void write_logits(const Model *model) {
    Text input = read_input();
    Tokens tokens = {0};
    add_bytes(&input, "", 1);
    char *at = input.bytes, *end;
    for (long long id; id = strtoll(at, &end, 10), end != at; at = end) append(&tokens, id);
    Reader reader = begin(model, tokens.count, CHUNK);
    for (int64_t read = 0, count; read < tokens.count; read += count) {
        count = tokens.count - read < CHUNK ? tokens.count - read : CHUNK;
        read_tokens(&reader, tokens.ids + read, read, count, 1);
        fwrite(reader.logits, sizeof(float), (size_t)(count * model->head.rows), stdout);
    }
}

int main(int count, char **arguments) {
    prepare_system(&count, &arguments);
    if (count && arguments[0]) program = arguments[0];
    Options options = read_options(count, arguments);
    const char *name = options.file ? options.file : program;
    FILE *file = options.file ? open_file(name) : open_itself();
    if (!file) fail("%s: cannot be read: %s", name, strerror(errno));
    int64_t start, length;
    if (!options.file && !find_packed(file, &start, &length)) fail("name a packed file: %s MODEL; see --help", program);
    Packed packed = read_packed(file, name);
    fclose(file);
    Model model = find_model(&packed);
    Vocabulary vocabulary = find_vocabulary(&packed);
    if (options.encode) encode_input(&vocabulary);
    else if (options.logits) write_logits(&model);
    else generate(&options, &packed, &model, &vocabulary);
    return fflush(stdout) || ferror(stdout);
}
