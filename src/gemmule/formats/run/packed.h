/* Reading a packed file (docs/formats.md): checksum, header, and the arrays of a model where they lie in memory.

   A file that is missing, foreign, truncated or damaged ends the program with a sentence. The checksum guards against
   accidents; every size and offset is checked as well, so that no file leads the program astray. */

#include <stdarg.h>
#include <stdio.h>

static const char *program = "story";

/* Print a sentence and exit. */
static void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fflush(stdout);
    fprintf(stderr, "%s: ", program);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
    exit(2);
}

/* Zeroed memory for `count` elements of `size` bytes. */
static void *allocate(int64_t count, uint64_t size) {
    void *memory = size < SIZE_MAX ? calloc(count ? (size_t)count : 1, size ? (size_t)size : 1) : NULL;
    if (!memory) fail("there is no memory for %lld times %llu bytes", (long long)count, (unsigned long long)size);
    return memory;
}

/* ---- SHA-256 (FIPS 180-4) ---- */

static uint32_t rotated(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

static void hash_block(uint32_t state[8], const uint8_t *block) {
    static const uint32_t constants[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    };
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t one = s[7] + (rotated(s[4], 6) ^ rotated(s[4], 11) ^ rotated(s[4], 25)) +
                       ((s[4] & s[5]) ^ (~s[4] & s[6])) + constants[i] + w[i];
        uint32_t two = (rotated(s[0], 2) ^ rotated(s[0], 13) ^ rotated(s[0], 22)) +
                       ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += one, s[0] = one + two;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
}

static void sha256(const uint8_t *bytes, uint64_t size, uint8_t digest[32]) {
    uint32_t state[8] = {
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    };
    uint8_t last[128] = {0};
    uint64_t whole = size / 64 * 64, rest = size - whole, end = rest < 56 ? 64 : 128;
    for (uint64_t i = 0; i < whole; i += 64) hash_block(state, bytes + i);
    memcpy(last, bytes + whole, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++) last[end - 1 - i] = (uint8_t)(size * 8 >> 8 * i);
    for (uint64_t i = 0; i < end; i += 64) hash_block(state, last + i);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

/* ---- the file ---- */

typedef struct {
    const char *name, *header;
    const uint8_t *arrays;
    int64_t size; /* bytes of the arrays */
} Packed;

static uint64_t number_at(const uint8_t *bytes, int size) {
    uint64_t value = 0;
    for (int i = size; i--;) value = value << 8 | bytes[i];
    return value;
}

static void damaged(const Packed *packed, const char *entry) {
    fail("%s: is damaged: %s of its header cannot be right", packed->name, entry);
}

/* Where the value of an entry begins; every name occurs once. */
static const char *find_entry(const Packed *packed, const char *entry) {
    char name[64];
    snprintf(name, sizeof name, "\"%s\":", entry);
    const char *found = strstr(packed->header, name);
    if (!found) damaged(packed, entry);
    return found + strlen(name);
}

/* Number `index` of a list, or for index -1 a number by itself; it lies between two limits. */
static double find_number(const Packed *packed, const char *entry, int64_t index, double least, double most) {
    const char *text = find_entry(packed, entry);
    if (index >= 0 && *text++ != '[') damaged(packed, entry);
    for (; index > 0; index--) {
        text += strcspn(text, ",]\"");
        if (*text++ != ',') damaged(packed, entry);
    }
    if (*text != '-' && (*text < '0' || *text > '9')) damaged(packed, entry);
    double value = strtod(text, NULL);
    if (!(value >= least && value <= most)) damaged(packed, entry);
    return value;
}
static int64_t find_whole(const Packed *packed, const char *entry, int64_t index, int64_t least, int64_t most) {
    double value = find_number(packed, entry, index, (double)least, (double)most);
    if (value != floor(value)) damaged(packed, entry);
    return (int64_t)value;
}

/* An array of `count` elements of `size` bytes, for layer `index`. */
static const void *find_array(const Packed *packed, const char *entry, int64_t index, int64_t count, int64_t size) {
    int64_t start = find_whole(packed, entry, index, 0, packed->size);
    if (start % 64 || count > (packed->size - start) / size) damaged(packed, entry);
    return packed->arrays + start;
}

/* Whether there is a packed file at the end of a program; `*length` is that of the whole file, or of its part. */
static int find_packed(FILE *file, int64_t *start, int64_t *length) {
    uint8_t tail[16] = {0};
    *start = 0, *length = 0;
    if (fseeko(file, 0, SEEK_END)) return 0;
    int64_t whole = *length = (int64_t)ftello(file);
    if (whole < 16 || fseeko(file, whole - 16, SEEK_SET) || fread(tail, 1, 16, file) != 16) return 0;
    int64_t given = (int64_t)number_at(tail, 8);
    if (memcmp(tail + 8, "GEMMPACK", 8) || given < 64 || given > whole - 16) return 0;
    *start = whole - 16 - given, *length = given;
    return 1;
}

static Packed read_packed(FILE *file, const char *name) {
    Packed packed = {.name = name};
    uint8_t digest[32];
    int64_t start, length;
    find_packed(file, &start, &length);
    if (length < 0 || length > (int64_t)1 << 46) fail("%s: cannot be read", name); /* a folder has such a length */
    uint8_t *bytes = allocate(length + 64, 1);
    bytes += 64 - (uintptr_t)bytes % 64;
    if (fseeko(file, start, SEEK_SET) || fread(bytes, 1, (size_t)length, file) != (size_t)length)
        fail("%s: cannot be read", name);
    if (length < 8 || memcmp(bytes, "GEMMPACK", 8)) fail("%s: is not a packed file, which begins with GEMMPACK", name);
    if (length < 64 || number_at(bytes + 48, 8) > (uint64_t)length)
        fail("%s: is truncated: it has %lld bytes", name, (long long)length);
    if (number_at(bytes + 8, 8) != 1)
        fail("%s: is a packed file of another version; this program reads version 1", name);
    uint64_t header = number_at(bytes + 56, 8);
    if (number_at(bytes + 48, 8) != (uint64_t)length || header % 64 || header > (uint64_t)length - 64)
        fail("%s: is damaged: its length is not what it says", name);
    sha256(bytes + 48, (uint64_t)length - 48, digest);
    if (memcmp(digest, bytes + 16, 32)) fail("%s: is damaged: its SHA-256 is not that of its content", name);
    char *text = allocate((int64_t)header + 1, 1);
    memcpy(text, bytes + 64, header);
    packed.header = text, packed.arrays = bytes + 64 + header, packed.size = length - 64 - (int64_t)header;
    return packed;
}

/* ---- the model ---- */

enum { MOST = 1 << 20 /* of every size of a model */ };

static Matrix find_matrix(const Packed *packed, const char *entry, int64_t index, int64_t rows, int64_t columns) {
    char scales[64];
    snprintf(scales, sizeof scales, "%s_scales", entry);
    const char *dtype = find_entry(packed, "dtype");
    int64_t kind = !strncmp(dtype, "\"f32\"", 5) ? F32 : !strncmp(dtype, "\"bf16\"", 6) ? BF16 : INT8;
    if (kind == INT8 && strncmp(dtype, "\"int8\"", 6)) damaged(packed, "dtype");
    int64_t size = kind == F32 ? 4 : kind == BF16 ? 2 : 1;
    return (Matrix){
        find_array(packed, entry, index, rows * columns, size),
        kind == INT8 ? find_array(packed, scales, index, rows, 4) : NULL,
        rows, columns, kind,
    };
}

static Layer find_layer(const Packed *packed, const Model *m, int64_t i) {
    int64_t queries = m->heads * m->size, keys = m->groups * m->size;
    return (Layer){
        .query = find_matrix(packed, "query", i, queries, m->width),
        .key = find_matrix(packed, "key", i, keys, m->width),
        .value = find_matrix(packed, "value", i, keys, m->width),
        .output = find_matrix(packed, "output", i, m->width, queries),
        .gate = find_matrix(packed, "gate", i, m->inner, m->width),
        .up = find_matrix(packed, "up", i, m->inner, m->width),
        .down = find_matrix(packed, "down", i, m->width, m->inner),
        .pre_attention = find_array(packed, "pre_attention_norm", i, m->width, 4),
        .post_attention = find_array(packed, "post_attention_norm", i, m->width, 4),
        .pre_mlp = find_array(packed, "pre_mlp_norm", i, m->width, 4),
        .post_mlp = find_array(packed, "post_mlp_norm", i, m->width, 4),
        .query_norm = find_array(packed, "query_norm", i, m->size, 4),
        .key_norm = find_array(packed, "key_norm", i, m->size, 4),
        .kind = find_whole(packed, "layer_kinds", i, LOCAL, GLOBAL),
    };
}

/* The model for step.c, whose weights stay where they are. */
static Model find_model(const Packed *packed) {
    Model m = {
        .width = find_whole(packed, "hidden_size", -1, 1, MOST),
        .heads = find_whole(packed, "num_attention_heads", -1, 1, MOST),
        .groups = find_whole(packed, "num_key_value_heads", -1, 1, MOST),
        .size = find_whole(packed, "head_dim", -1, 2, MOST),
        .inner = find_whole(packed, "intermediate_size", -1, 1, MOST),
        .layers = find_whole(packed, "num_hidden_layers", -1, 1, 4096),
        .eps = (float)find_number(packed, "rms_norm_eps", -1, 1e-30, 1e30),
        .embedding_scale = (float)find_number(packed, "embedding_scale", -1, 1e-30, 1e30),
        .query_scale = (float)pow(find_number(packed, "query_pre_attn_scalar", -1, 1, 9007199254740992.0), -0.5),
        .threads = 1,
    };
    int64_t rows = find_whole(packed, "vocab_size", -1, 1, MOST);
    if (m.heads % m.groups || m.size % 2) damaged(packed, "num_key_value_heads or head_dim");
    m.embedding = find_matrix(packed, "embedding", 0, rows, m.width);
    m.head = find_whole(packed, "tied", -1, 0, 1) ? m.embedding : find_matrix(packed, "head", 0, rows, m.width);
    m.norm = find_array(packed, "norm", 0, m.width, 4);
    const float *frequencies = find_array(packed, "frequencies", 0, m.size, 4);
    for (int kind = 0; kind < KINDS; kind++)
        m.kinds[kind] = (Kind){
            frequencies + kind * (m.size / 2),
            find_whole(packed, "windows", kind, 0, 9007199254740992),
            (float)find_number(packed, "rope_factors", kind, 1, 1e30),
        };
    find_whole(packed, "layer_kinds", m.layers - 1, LOCAL, GLOBAL); /* before memory is allocated for so many */
    Layer *layers = allocate(m.layers, sizeof *layers);
    int64_t count[KINDS] = {0};
    for (int64_t i = 0; i < m.layers; i++) {
        layers[i] = find_layer(packed, &m, i);
        layers[i].offset = count[layers[i].kind]++ * 2 * m.groups * m.size * PAGE;
    }
    m.layer = layers;
#ifdef _OPENMP
    m.threads = omp_get_max_threads();
#endif
    return m;
}
