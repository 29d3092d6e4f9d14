/* Byte-pair encoding by the arrays of a packed file, and decoding to UTF-8 that arrives in parts. */

enum { NO_TOKEN = -1 };

typedef struct {
    int64_t size, characters, merges, added; /* ids; rows of the arrays */
    const uint32_t *token_starts, *character, *byte_tokens, *merge, *added_token, *added_starts;
    const char *token_texts, *added_texts;
    int64_t bos;
    int32_t *ranks, *first, *next; /* hash table of merges by pair; added tokens by their first byte, chained */
    uint64_t mask;                 /* of the hash table */
} Vocabulary;

typedef struct {
    int64_t *ids;
    int64_t count, room;
} Tokens;

static void append(Tokens *tokens, int64_t id) {
    if (tokens->count == tokens->room) {
        tokens->room = tokens->room ? 2 * tokens->room : 64;
        tokens->ids = realloc(tokens->ids, (size_t)tokens->room * sizeof *tokens->ids);
        if (!tokens->ids) fail("there is no memory for so many tokens");
    }
    tokens->ids[tokens->count++] = id;
}

/* ---- the arrays ---- */

static uint64_t place_of(const Vocabulary *v, uint32_t left, uint32_t right) {
    uint64_t mixed = ((uint64_t)left << 32 | right) * 0x9e3779b97f4a7c15u;
    return (mixed ^ mixed >> 32) & v->mask;
}

/* The rank of a pair, -1 where nothing is merged. */
static int32_t rank_of(const Vocabulary *v, int64_t left, int64_t right) {
    for (uint64_t place = place_of(v, (uint32_t)left, (uint32_t)right);; place = (place + 1) & v->mask) {
        int32_t rank = v->ranks[place];
        if (rank < 0 || (v->merge[3 * rank] == left && v->merge[3 * rank + 1] == right)) return rank;
    }
}

static void check_ids(const Packed *packed, const uint32_t *ids, int64_t count, int64_t stride, int64_t size) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i * stride] >= size) fail("%s: is damaged: its vocabulary has no id %u", packed->name, ids[i * stride]);
}
static void check_starts(const Packed *packed, const uint32_t *starts, int64_t count, int64_t bytes) {
    int wrong = starts[0] != 0 || starts[count] != bytes;
    for (int64_t i = 0; i < count; i++) wrong |= starts[i] > starts[i + 1];
    if (wrong) fail("%s: is damaged: texts of its vocabulary overlap", packed->name);
}

static Vocabulary find_vocabulary(const Packed *packed) {
    const int64_t most = INT32_MAX / 4;
    Vocabulary v = {
        .size = find_whole(packed, "vocab_size", -1, 1, MOST),
        .characters = find_whole(packed, "num_characters", -1, 0, most),
        .merges = find_whole(packed, "num_merges", -1, 0, most),
        .added = find_whole(packed, "num_added_tokens", -1, 0, most),
    };
    int64_t bytes = find_whole(packed, "token_text_bytes", -1, 0, UINT32_MAX);
    int64_t added_bytes = find_whole(packed, "added_text_bytes", -1, 0, UINT32_MAX);
    v.bos = find_whole(packed, "bos", -1, NO_TOKEN, v.size - 1);
    v.token_starts = find_array(packed, "token_starts", 0, v.size + 1, 4);
    v.token_texts = find_array(packed, "token_texts", 0, bytes, 1);
    v.character = find_array(packed, "characters", 0, 2 * v.characters, 4);
    v.byte_tokens = find_array(packed, "byte_tokens", 0, 256, 4);
    v.merge = find_array(packed, "merges", 0, 3 * v.merges, 4);
    v.added_token = find_array(packed, "added_tokens", 0, 2 * v.added, 4);
    v.added_starts = find_array(packed, "added_starts", 0, v.added + 1, 4);
    v.added_texts = find_array(packed, "added_texts", 0, added_bytes, 1);
    check_starts(packed, v.token_starts, v.size, bytes);
    check_starts(packed, v.added_starts, v.added, added_bytes);
    check_ids(packed, v.byte_tokens, 256, 1, v.size);
    check_ids(packed, v.character + 1, v.characters, 2, v.size);
    check_ids(packed, v.merge, 3 * v.merges, 1, v.size);
    for (v.mask = 15; v.mask < 2 * (uint64_t)v.merges; v.mask = 2 * v.mask + 1) {}
    v.ranks = allocate((int64_t)v.mask + 1, sizeof *v.ranks);
    memset(v.ranks, 0xff, (size_t)(v.mask + 1) * sizeof *v.ranks);
    for (int32_t i = 0; i < v.merges; i++) {
        uint64_t place = place_of(&v, v.merge[3 * i], v.merge[3 * i + 1]);
        while (v.ranks[place] >= 0) place = (place + 1) & v.mask;
        v.ranks[place] = i;
    }
    v.first = allocate(256, sizeof *v.first), v.next = allocate(v.added, sizeof *v.next);
    memset(v.first, 0xff, 256 * sizeof *v.first);
    for (int32_t i = 0; i < v.added; i++) {
        if (!v.added_token[2 * i + 1]) check_ids(packed, v.added_token + 2 * i, 1, 1, v.size);
        if (v.added_starts[i] == v.added_starts[i + 1]) continue;
        int32_t *list = v.first + (uint8_t)v.added_texts[v.added_starts[i]];
        v.next[i] = *list, *list = i;
    }
    return v;
}

/* ---- encoding ---- */

/* Bytes of the UTF-8 character at the beginning of a text; 0 where there is none, and then `*needed` bytes of it could
   begin one. */
static int character_at(const uint8_t *text, int64_t size, uint32_t *point, int *needed) {
    uint8_t lead = text[0];
    int length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    uint32_t value = length < 2 ? lead : lead & (0x7fu >> length);
    *needed = 1;
    for (int i = 1; i < length; i++, *needed = i) {
        if (i >= size) return 0;
        uint8_t low = i > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        uint8_t high = i > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
        if (text[i] < low || text[i] > high) return 0;
        value = value << 6 | (text[i] & 0x3f);
    }
    *point = value;
    return length;
}

static int64_t id_of_character(const Vocabulary *v, uint32_t point) {
    int64_t low = 0, high = v->characters;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (v->character[2 * middle] < point) low = middle + 1;
        else high = middle;
    }
    int found = low < v->characters && v->character[2 * low] == point;
    return found ? (int64_t)v->character[2 * low + 1] : NO_TOKEN;
}

/* A pair of neighbors that can be merged; a heap has the lowest rank, and of equal ones the leftmost, at its root. */
typedef struct {
    int32_t rank;
    int64_t at;
} Pair;

static int is_before(Pair a, Pair b) { return a.rank != b.rank ? a.rank < b.rank : a.at < b.at; }

static void push(Pair *heap, int64_t *count, Pair pair) {
    int64_t i = (*count)++;
    for (; i && is_before(pair, heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = pair;
}
static Pair pop(Pair *heap, int64_t *count) {
    Pair root = heap[0], last = heap[--*count];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < *count; i = child) {
        if (child + 1 < *count && is_before(heap[child + 1], heap[child])) child++;
        if (!is_before(heap[child], last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return root;
}

/* Encode a text without added tokens. */
static void encode_piece(const Vocabulary *v, const uint8_t *text, int64_t size, Tokens *tokens) {
    if (!size) return;
    int64_t *ids = allocate(size, 3 * sizeof *ids), *before = ids + size, *after = before + size;
    int64_t count = 0, pairs = 0;
    for (int64_t i = 0; i < size;) {
        uint32_t point = 0;
        int needed, length = character_at(text + i, size - i, &point, &needed);
        int64_t id = length ? id_of_character(v, point) : NO_TOKEN, bytes = length ? length : 1;
        if (id != NO_TOKEN) ids[count++] = id;
        else
            for (int64_t b = 0; b < bytes; b++) ids[count++] = v->byte_tokens[text[i + b]];
        i += bytes;
    }
    Pair *heap = allocate(count, 3 * sizeof *heap);
    for (int64_t i = 0; i < count; i++) {
        before[i] = i - 1, after[i] = i + 1;
        int32_t rank = i + 1 < count ? rank_of(v, ids[i], ids[i + 1]) : -1;
        if (rank >= 0) push(heap, &pairs, (Pair){rank, i});
    }
    while (pairs) {
        Pair pair = pop(heap, &pairs);
        int64_t left = pair.at, right = after[left];
        /* Where one of the two was merged meanwhile, they are no pair any longer. */
        if (ids[left] == NO_TOKEN || right >= count || rank_of(v, ids[left], ids[right]) != pair.rank) continue;
        ids[left] = v->merge[3 * pair.rank + 2], ids[right] = NO_TOKEN;
        after[left] = after[right];
        if (after[left] < count) before[after[left]] = left;
        int32_t rank = after[left] < count ? rank_of(v, ids[left], ids[after[left]]) : -1;
        if (rank >= 0) push(heap, &pairs, (Pair){rank, left});
        rank = before[left] >= 0 ? rank_of(v, ids[before[left]], ids[left]) : -1;
        if (rank >= 0) push(heap, &pairs, (Pair){rank, before[left]});
    }
    for (int64_t i = 0; i < count; i = after[i]) append(tokens, ids[i]);
    free(heap), free(ids);
}

/* The longest added token at the beginning of a text, or -1. */
static int32_t added_at(const Vocabulary *v, const char *text, int64_t size) {
    int32_t best = -1;
    int64_t longest = 0;
    for (int32_t i = v->first[(uint8_t)*text]; i >= 0; i = v->next[i]) {
        int64_t length = v->added_starts[i + 1] - v->added_starts[i];
        const char *added = v->added_texts + v->added_starts[i];
        if (length > longest && length <= size && !memcmp(text, added, (size_t)length)) best = i, longest = length;
    }
    return best;
}

/* Encode a text, with bos where the vocabulary has it. Special tokens in the text stay text. */
static Tokens encode(const Vocabulary *v, const char *text, int64_t size) {
    Tokens tokens = {0};
    if (v->bos != NO_TOKEN) append(&tokens, v->bos);
    int64_t start = 0;
    for (int64_t i = 0; i < size;) {
        int32_t found = added_at(v, text + i, size - i);
        int64_t end = found < 0 ? i + 1 : i + v->added_starts[found + 1] - v->added_starts[found];
        if (found >= 0 && !v->added_token[2 * found + 1]) {
            encode_piece(v, (const uint8_t *)text + start, i - start, &tokens);
            append(&tokens, v->added_token[2 * found]);
            start = end;
        }
        i = end;
    }
    encode_piece(v, (const uint8_t *)text + start, size - start, &tokens);
    return tokens;
}

/* ---- decoding ---- */

typedef struct {
    char *bytes;
    int64_t count, room;
} Text;

static void add_bytes(Text *text, const char *bytes, int64_t count) {
    if (!text->bytes || text->count + count > text->room) {
        text->room = 2 * (text->count + count) + 64;
        text->bytes = realloc(text->bytes, (size_t)text->room);
        if (!text->bytes) fail("there is no memory for the text");
    }
    memcpy(text->bytes + text->count, bytes, (size_t)count);
    text->count += count;
}

/* Move complete characters from `bytes` to `text`; what is no UTF-8 becomes U+FFFD, at the end an incomplete rest. */
static void decode(Text *bytes, Text *text, int at_end) {
    int64_t i = 0;
    while (i < bytes->count) {
        uint32_t point;
        int needed, length = character_at((const uint8_t *)bytes->bytes + i, bytes->count - i, &point, &needed);
        if (!length && i + needed == bytes->count && !at_end && (uint8_t)bytes->bytes[i] >= 0xc2 &&
            (uint8_t)bytes->bytes[i] < 0xf5) break; /* the rest of it may follow */
        add_bytes(text, length ? bytes->bytes + i : "\xef\xbf\xbd", length ? length : 3);
        i += length ? length : needed;
    }
    memmove(bytes->bytes, bytes->bytes + i, (size_t)(bytes->count - i));
    bytes->count -= i;
}
