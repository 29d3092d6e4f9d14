"use strict";
/* A Gemma 3 in JavaScript and WebAssembly: reads a packed file (docs/formats.md), tokenizes, generates.

   The forward pass and sampling are step.c and sample.c of gemmule/inference/native, in step.wasm; this file has the
   rest. It runs in a Worker, on a page's own thread and in node, and makes no request. */

/* A failure that is told to the user as it is. */
class Problem extends Error {}

const ALIGNMENT = 64;
const PAGE = 16;  // positions of a page of the KV cache, as in step.c
const CHUNK = 8;  // tokens of a prompt that are read in one step; between steps a reply can be stopped
const LOCAL = 0;

/* ---- loading: base64, SHA-256 ---- */

function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/* The SHA-256 of bytes in hexadecimal digits. Pages that came by plain HTTP have no crypto.subtle. */
async function sha256(bytes) {
  const subtle = globalThis.crypto?.subtle;
  const digest = subtle ? new Uint8Array(await subtle.digest("SHA-256", bytes)) : plainSha256(bytes);
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/* FIPS 180-4. Its constants are the fractions of roots of the first primes. */
function plainSha256(bytes) {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((prime) => n % prime)) primes.push(n);
  const fraction = (root) => ((root - Math.floor(root)) * 2 ** 32) | 0;
  const constants = primes.map((prime) => fraction(Math.cbrt(prime)));
  const state = Int32Array.from(primes.slice(0, 8), (prime) => fraction(Math.sqrt(prime)));
  const rest = bytes.length % 64, end = new Uint8Array(rest < 56 ? 64 : 128), words = new Int32Array(64);
  end.set(bytes.subarray(bytes.length - rest));
  end[rest] = 0x80;
  new DataView(end.buffer).setBigUint64(end.length - 8, BigInt(bytes.length) * 8n);
  const turn = (x, by) => (x >>> by) | (x << (32 - by));
  const block = (view, at) => {
    for (let i = 0; i < 16; i++) words[i] = view.getInt32(at + 4 * i);
    for (let i = 16; i < 64; i++) {
      const early = words[i - 15], late = words[i - 2];
      const s0 = turn(early, 7) ^ turn(early, 18) ^ (early >>> 3), s1 = turn(late, 17) ^ turn(late, 19) ^ (late >>> 10);
      words[i] = words[i - 16] + s0 + words[i - 7] + s1;
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i++) {
      const first = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + constants[i] + words[i]) | 0;
      const second = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      h = g, g = f, f = e, e = (d + first) | 0, d = c, c = b, b = a, a = (first + second) | 0;
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => { state[i] += value; });
  };
  const whole = new DataView(bytes.buffer, bytes.byteOffset, bytes.length - rest), last = new DataView(end.buffer);
  for (let at = 0; at < whole.byteLength; at += 64) block(whole, at);
  for (let at = 0; at < last.byteLength; at += 64) block(last, at);
  const digest = new DataView(new ArrayBuffer(32));
  state.forEach((value, i) => digest.setInt32(4 * i, value));
  return new Uint8Array(digest.buffer);
}

/* ---- the vocabulary ---- */

/* Text to ids and back, by the arrays of a packed file. */
class Vocabulary {
  constructor(header, array) {
    const ids = (key) => array(key, Uint32Array);
    const [points, pairs, added, starts] = ["characters", "merges", "added_tokens", "added_starts"].map(ids);
    this.bos = header.bos;
    this.size = header.vocab_size;
    this.bytes = ids("byte_tokens");
    this.starts = ids("token_starts");
    this.texts = array("token_texts", Uint8Array);
    this.characters = new Map();
    for (let i = 0; i < points.length; i += 2) this.characters.set(points[i], points[i + 1]);
    this.merges = new Map();  // of a pair: its rank, and what it becomes, in one number
    for (let i = 0; i < pairs.length; i += 3)
      this.merges.set(pairs[i] * this.size + pairs[i + 1], (i / 3) * this.size + pairs[i + 2]);
    const texts = array("added_texts", Uint8Array), utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
    this.added = new Map();  // by first character, the longest ones first
    for (let i = 0; i < added.length / 2; i++) {
      const text = utf8.decode(texts.subarray(starts[i], starts[i + 1]));
      if (!this.added.has(text[0])) this.added.set(text[0], []);
      this.added.get(text[0]).push({ text, id: added[2 * i], special: added[2 * i + 1] });
    }
    for (const group of this.added.values()) group.sort((one, other) => other.text.length - one.text.length);
  }

  /* The ids of a text, without bos. A special token in it is encoded as any other text. */
  encode(text) {
    const ids = [];
    let begun = 0;
    for (let at = 0; at < text.length;) {
      const found = this.added.get(text[at])?.find((token) => text.startsWith(token.text, at));
      if (found && !found.special) {
        this.#merge(text.slice(begun, at), ids);
        ids.push(found.id);
        begun = at + found.text.length;
      }
      at += found ? found.text.length : 1;
    }
    this.#merge(text.slice(begun), ids);
    return ids;
  }

  /* Append the ids of a text without added tokens: adjacent ids are merged, the lowest rank first, then the leftmost. */
  #merge(text, ids) {
    const own = [], utf8 = new TextEncoder();
    for (const character of text) {
      const id = this.characters.get(character.codePointAt(0));
      if (id !== undefined) own.push(id);
      else for (const byte of utf8.encode(character)) own.push(this.bytes[byte]);
    }
    const next = own.map((_, i) => i + 1), before = own.map((_, i) => i - 1), queue = new Queue();
    const offer = (left) => {
      const right = next[left];
      if (left < 0 || right >= own.length) return;
      const merge = this.merges.get(own[left] * this.size + own[right]);
      if (merge !== undefined)
        queue.push({ rank: Math.floor(merge / this.size), left, pair: [own[left], own[right]], id: merge % this.size });
    };
    for (let i = 0; i + 1 < own.length; i++) offer(i);
    for (let best; (best = queue.pop());) {
      const { left, pair, id } = best, right = next[left];
      if (own[left] !== pair[0] || own[right] !== pair[1]) continue;  // one of them has been merged since
      own[left] = id, own[right] = -1;
      next[left] = next[right];
      if (next[left] < own.length) before[next[left]] = left;
      offer(before[left]);
      offer(left);
    }
    for (const id of own) if (id >= 0) ids.push(id);
  }

  /* The ids of a prompt. */
  prompt(text) {
    return [...(this.bos < 0 ? [] : [this.bos]), ...this.encode(text)];
  }

  /* The bytes of an id within a text; special tokens have none. */
  piece(id) {
    return this.texts.subarray(this.starts[id], this.starts[id + 1]);
  }
}

/* A binary heap of merges: the lowest rank first, of equal ones the leftmost. */
class Queue {
  #heap = [];

  #less(i, j) {
    const one = this.#heap[i], other = this.#heap[j];
    return one.rank < other.rank || (one.rank === other.rank && one.left < other.left);
  }

  #swap(i, j) {
    [this.#heap[i], this.#heap[j]] = [this.#heap[j], this.#heap[i]];
  }

  push(item) {
    let at = this.#heap.push(item) - 1;
    for (let above; at && this.#less(at, (above = (at - 1) >> 1)); at = above) this.#swap(at, above);
  }

  pop() {
    const heap = this.#heap, first = heap[0], last = heap.pop();
    if (heap.length) {
      heap[0] = last;
      for (let at = 0, least; ; at = least) {
        least = at;
        for (const below of [2 * at + 1, 2 * at + 2]) if (below < heap.length && this.#less(below, least)) least = below;
        if (least === at) break;
        this.#swap(at, least);
      }
    }
    return first;
  }
}

/* The prompt of a chat by Gemma's template; texts of the user never become special tokens. */
function chatPrompt(header, vocabulary, turns) {
  const ids = vocabulary.prompt("");
  for (const { role, text } of turns) {
    ids.push(header.start_of_turn, ...vocabulary.encode(`${role}\n`), ...vocabulary.encode(strip(text)));
    ids.push(header.end_of_turn, ...vocabulary.encode("\n"));
  }
  ids.push(header.start_of_turn, ...vocabulary.encode("model\n"));
  return ids;
}

/* A text without the white space around it, as Python's strip() has it. */
function strip(text) {
  const isSpace = (at) => /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]/.test(text[at]);
  let start = 0, end = text.length;
  while (start < end && isSpace(start)) start++;
  while (end > start && isSpace(end - 1)) end--;
  return text.slice(start, end);
}

/* ---- the text of a reply ---- */

/* Text token by token: incomplete UTF-8 is held back, and so is what a stop text could begin with. */
class TextStream {
  #utf8 = new TextDecoder("utf-8", { ignoreBOM: true });
  #held = "";

  constructor(vocabulary, stops) {
    this.vocabulary = vocabulary;
    this.stops = stops;
    this.stopped = false;
  }

  /* Add a token; return the text that may be shown now. */
  feed(id) {
    return this.#add(this.#utf8.decode(this.vocabulary.piece(id), { stream: true }));
  }

  /* The rest of a reply that ends here. */
  end() {
    const text = this.#add(this.#utf8.decode()) + this.#held;
    this.#held = "";
    return text;
  }

  /* The reply ends before the stop text that is completed first; of several, the longest counts. */
  #add(added) {
    if (this.stopped) return "";
    const text = this.#held + added;
    for (let end = this.#held.length + 1; end <= text.length; end++) {
      const found = this.stops.filter((stop) => text.slice(0, end).endsWith(stop)).map((stop) => stop.length);
      if (!found.length) continue;
      this.stopped = true;
      this.#held = "";
      return text.slice(0, end - Math.max(...found));
    }
    let begun = 0;
    for (const stop of this.stops)
      for (let size = Math.min(stop.length - 1, text.length); size > begun; size--)
        if (text.endsWith(stop.slice(0, size))) begun = size;
    this.#held = text.slice(text.length - begun);
    return text.slice(0, text.length - begun);
  }
}

/* ---- random numbers ---- */

const BLAKE2B_START = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const BLAKE2B_ORDER = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
  "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
].map((order) => Array.from(order, (digit) => parseInt(digit, 16)));
const BLAKE2B_PLACES = [
  [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14],
];

/* The number in [0, 1) by which token `index` of a reply is drawn: uniform() of inference/sampling.py.

   BLAKE2b (RFC 7693) of seed, sample 0 and index, with 8 bytes of digest, personalized as "gemmule-sampling". */
function uniform(seed, index) {
  const start = [...BLAKE2B_START];
  start[0] ^= 0x01010008n, start[6] ^= 0x2d656c756d6d6567n, start[7] ^= 0x676e696c706d6173n;
  const v = BigUint64Array.from([...start, ...BLAKE2B_START]), text = new BigUint64Array(16);
  text[0] = BigInt(seed), text[2] = BigInt(index);
  v[12] ^= 24n, v[14] = ~v[14];
  const turn = (at, by) => { v[at] = (v[at] >> by) | (v[at] << (64n - by)); };
  for (let round = 0; round < 12; round++)
    BLAKE2B_PLACES.forEach(([a, b, c, d], i) => {
      const order = BLAKE2B_ORDER[round % 10];
      v[a] += v[b] + text[order[2 * i]], v[d] ^= v[a], turn(d, 32n);
      v[c] += v[d], v[b] ^= v[c], turn(b, 24n);
      v[a] += v[b] + text[order[2 * i + 1]], v[d] ^= v[a], turn(d, 16n);
      v[c] += v[d], v[b] ^= v[c], turn(b, 63n);
    });
  return Number((start[0] ^ v[0] ^ v[8]) >> 11n) * 2 ** -53;
}

/* ---- the model ---- */

/* Members of C structures in wasm32, each with its natural alignment; a list is a structure with one of 8 bytes. */
const pointer = (value) => ({ size: 4, write: (view, at) => view.setUint32(at, value, true) });
const float = (value) => ({ size: 4, write: (view, at) => view.setFloat32(at, value, true) });
const double = (value) => ({ size: 8, write: (view, at) => view.setFloat64(at, value, true) });
const int64 = (value) => ({ size: 8, write: (view, at) => view.setBigInt64(at, BigInt(value), true) });
const roundUp = (number, to) => Math.ceil(number / to) * to;

/* Write members from `at` on; return where they end. Without a view nothing is written. */
function writeStructure(view, at, members) {
  at = roundUp(at, 8);
  for (const member of members) {
    if (Array.isArray(member)) {
      at = writeStructure(view, at, member);
      continue;
    }
    at = roundUp(at, member.size);
    if (view) member.write(view, at);
    at += member.size;
  }
  return roundUp(at, 8);
}

const NO_SIMD = "This browser cannot compute with vectors in WebAssembly, which the model needs; use a newer browser.";
/* A module with one instruction of 128-bit vectors. */
const SIMD_MODULE = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];

function hasSimd() {
  return typeof WebAssembly === "object" && WebAssembly.validate(Uint8Array.from(SIMD_MODULE));
}

/* A model in the memory of step.wasm, and the KV cache of one text. */
class Model {
  /* Prepare memory for a packed file of so many bytes, which `write` fills. */
  static async make(wasm, bytes) {
    if (!hasSimd()) throw new Problem(NO_SIMD);
    const model = new Model();
    const { instance } = await WebAssembly.instantiate(wasm, {});
    model.wasm = instance.exports;
    model.wasm._initialize?.();
    model.bytes = bytes;
    model.file = roundUp(model.allocate(bytes + ALIGNMENT), ALIGNMENT);
    return model;
  }

  allocate(bytes) {
    const address = this.wasm.malloc(Math.max(bytes, 8)) >>> 0;
    if (!address) throw new Problem(`This device has too little memory for the model: ${Math.ceil(bytes / 1e6)} MB more are needed.`);
    return address;
  }

  /* Write a structure into new memory. */
  structure(members) {
    const address = this.allocate(writeStructure(null, 0, members));
    writeStructure(new DataView(this.wasm.memory.buffer), address, members);
    return address;
  }

  numbers(kind, values) {
    const address = this.allocate(values.length * kind.BYTES_PER_ELEMENT);
    this.view(kind, address, values.length).set(values);
    return address;
  }

  /* A view of memory; no longer one after the next allocation. */
  view(kind, address, length) {
    return new kind(this.wasm.memory.buffer, address, length);
  }

  write(offset, part) {
    this.view(Uint8Array, this.file + offset, part.length).set(part);
  }

  /* Read the file when all of it is written. */
  open() {
    const beginning = new DataView(this.wasm.memory.buffer, this.file, 64), text = new TextDecoder();
    const magic = text.decode(this.view(Uint8Array, this.file, 8)), version = beginning.getUint32(8, true);
    if (magic !== "GEMMPACK" || version !== 1) throw new Problem("The weights are not a packed file of version 1.");
    const header = Number(beginning.getBigUint64(56, true));
    this.arrays = this.file + 64 + header;
    this.header = JSON.parse(text.decode(this.view(Uint8Array, this.file + 64, header)));
    this.struct = this.structure(this.describe());
    this.vocabulary = new Vocabulary(this.header, (key, kind) => this.array(key, kind));
    this.positions = 0;  // that the KV cache has room for
    this.read = [];  // the tokens in it
    this.written = 0;  // positions that were written since it was empty
    this.drawing = this.allocate(Number(this.wasm.draw_bytes(BigInt(this.header.vocab_size))));
    this.logits = this.allocate(4 * this.header.vocab_size);
  }

  /* A copy of an array of the vocabulary. */
  array(key, kind) {
    const names = { token_texts: "token_text_bytes", added_texts: "added_text_bytes" };
    const { header } = this, columns = { characters: 2, merges: 3, added_tokens: 2 };
    const length = { token_starts: header.vocab_size + 1, byte_tokens: 256, added_starts: header.num_added_tokens + 1 };
    const size = length[key] ?? (names[key] ? header[names[key]] : header[`num_${key}`] * columns[key]);
    return this.view(kind, this.place(key, 0), size).slice();
  }

  place(key, layer) {
    return this.arrays + this.header.arrays[key][layer];
  }

  /* `Model` of step.c. */
  describe() {
    const { header } = this, size = header.head_dim, width = header.hidden_size, inner = header.intermediate_size;
    const queries = header.num_attention_heads * size, keys = header.num_key_value_heads * size;
    const dtype = ["f32", "bf16", "int8"].indexOf(header.dtype);
    const matrix = (key, layer, rows, columns) => [
      pointer(this.place(key, layer)), pointer(header.dtype === "int8" ? this.place(`${key}_scales`, layer) : 0),
      int64(rows), int64(columns), int64(dtype),
    ];
    const norms = ["pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm", "query_norm", "key_norm"];
    const count = [0, 0], layerNumbers = 2 * keys * PAGE;
    const layers = header.layer_kinds.map((kind, i) => [
      matrix("query", i, queries, width), matrix("key", i, keys, width), matrix("value", i, keys, width),
      matrix("output", i, width, queries), matrix("gate", i, inner, width), matrix("up", i, inner, width),
      matrix("down", i, width, inner), ...norms.map((key) => pointer(this.place(key, i))),
      int64(kind), int64(layerNumbers * count[kind]++),
    ]);
    this.pageNumbers = count.map((layers) => layers * layerNumbers);  // numbers of a page, by kind
    const embedding = matrix("embedding", 0, header.vocab_size, width), frequencies = this.place("frequencies", 0);
    return [
      ...[width, header.num_attention_heads, header.num_key_value_heads, size, inner, layers.length].map(int64),
      float(header.rms_norm_eps), float(header.embedding_scale), float(header.query_pre_attn_scalar ** -0.5),
      embedding, header.tied ? embedding : matrix("head", 0, header.vocab_size, width),
      pointer(this.place("norm", 0)), pointer(this.structure(layers)),
      ...header.windows.map((window, kind) => [
        pointer(frequencies + kind * 2 * size), int64(window), float(header.rope_factors[kind]),
      ]),
      int64(1),
    ];
  }

  /* Make a KV cache for a text of so many tokens, empty; one that is large enough is kept. */
  reserve(tokens) {
    if (tokens <= this.positions) return;
    const wanted = Math.min(this.header.max_position_embeddings, Math.max(512, 2 * tokens));
    for (const address of this.cache ?? []) this.wasm.free(address);
    this.cache = [];
    this.read = [];
    this.positions = this.written = 0;
    const kept = (address) => (this.cache.push(address), address), longest = roundUp(Math.max(tokens, wanted), PAGE);
    this.batches = {};
    this.ring = this.header.windows.map((window) => {  // pages of each kind; behind the window they are used again
      const pages = longest / PAGE;
      return window ? Math.min(pages, Math.ceil((window + CHUNK) / PAGE) + 2) : pages;
    });
    this.pages = this.ring.map((pages, kind) => {
      const table = Int32Array.from({ length: longest / PAGE }, (_, page) => 1 + (page % pages));
      const numbers = this.pageNumbers[kind], bytes = 4 * numbers * (pages + 1), memory = kept(this.allocate(bytes));
      this.view(Uint8Array, memory, bytes).fill(0);
      return [pointer(memory), int64(pages + 1), int64(numbers), pointer(kept(this.numbers(Int32Array, table)))];
    });
    this.places = ["tokens", "positions", "row"].map(() => kept(this.numbers(BigInt64Array, new Array(CHUNK).fill(0n))));
    this.batch = (count, output) => kept(this.structure([
      int64(count), int64(1), int64(longest), ...this.places.map(pointer), int64(1),
      pointer(kept(this.numbers(BigInt64Array, [BigInt(output)]))), ...this.pages,
    ]));
    this.workspace = kept(this.allocate(4 * Number(this.wasm.workspace_floats(this.struct, BigInt(CHUNK), BigInt(longest)))));
    this.positions = longest;
  }

  /* Begin a text; what it has in common with the one before stays in the cache. Returns how many tokens those are. */
  begin(tokens) {
    let common = 0;
    while (common < tokens.length - 1 && tokens[common] === this.read[common]) common++;
    const window = this.header.windows[LOCAL], last = Math.floor(Math.max(0, this.written - 1) / PAGE);
    const first = Math.floor(Math.max(0, common - window + 1) / PAGE);
    // Pages of the window before the next token may have been used again for later positions.
    if (window && first + this.ring[LOCAL] <= last) common = 0;
    if (!common) this.written = 0;
    this.read.length = common;
    return common;
  }

  /* Read the next tokens, at most CHUNK; the logits after the last one are in memory then. */
  step(tokens) {
    const count = tokens.length, first = this.read.length;
    const batch = (this.batches[count] ??= this.batch(count, count - 1));
    this.view(BigInt64Array, this.places[0], count).set(tokens.map(BigInt));
    this.view(BigInt64Array, this.places[1], count).set(tokens.map((_, i) => BigInt(first + i)));
    const failed = this.wasm.step(this.struct, batch, this.workspace, this.logits);
    if (failed) throw new Error(`step ${failed}`);
    this.read.push(...tokens);
    this.written = Math.max(this.written, this.read.length);
  }

  /* Draw a token from the logits. */
  draw(sampling, number) {
    const settings = this.structure([
      double(sampling.temperature), double(sampling.top_p), double(sampling.min_p), int64(sampling.top_k),
    ]);
    const size = BigInt(this.header.vocab_size);
    const token = Number(this.wasm.draw_token(this.logits, size, settings, number, this.drawing));
    this.wasm.free(settings);
    if (token < 0) throw new Problem("The model's logits are not finite: its weights are damaged.");
    return token;
  }
}

/* ---- generation ---- */

/* Let messages be handled, also in a hidden tab, where timers wait for seconds. */
const channel = typeof process === "undefined" ? new MessageChannel() : null;  // which would keep node from ending
function pause() {
  return new Promise((resolve) => {
    if (!channel) return setImmediate(resolve);
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
}

/* Continue tokens; `emit` gets each token with the text that it completes. Returns why and how it ended. */
async function generate(model, tokens, settings, emit, isStopped) {
  const { header, vocabulary } = model, longest = header.max_position_embeddings;
  if (!tokens.length) throw new Problem("The prompt is empty: write how the text begins.");
  if (tokens.length >= longest)
    throw new Problem(`The prompt has ${tokens.length} tokens; this model reads fewer than ${longest}: shorten it.`);
  const most = Math.min(settings.max_tokens, longest - tokens.length), stream = new TextStream(vocabulary, settings.stop);
  const ended = { reason: "length", tokens: 0, prompt: tokens.length, seconds: 0 };
  model.reserve(tokens.length + most - 1);
  let begun = performance.now();
  for (let at = model.begin(tokens); at < tokens.length; at += CHUNK) {
    model.step(tokens.slice(at, at + CHUNK));
    await pause();
    if (isStopped()) return { ...ended, reason: "stopped" };
  }
  begun = performance.now();
  while (ended.tokens < most) {
    const number = settings.temperature > 0 ? uniform(settings.seed, ended.tokens) : 0;
    const token = model.draw(settings, number), isStop = header.stops.includes(token);
    ended.tokens++;
    ended.seconds = (performance.now() - begun) / 1000;
    emit(token, isStop ? "" : stream.feed(token));
    if (isStop || stream.stopped) ended.reason = "stop";
    if (isStop || stream.stopped || ended.tokens >= most) break;
    model.step([token]);
    await pause();
    if (isStopped()) {
      ended.reason = "stopped";
      break;
    }
  }
  emit(null, stream.end());
  if (stream.stopped) ended.reason = "stop";
  return ended;
}

/* Answer the messages of a page: begin, part (of the file), open, generate; stop ends a reply after its next token. */
function serve(port) {
  let model, stopped = false, work = Promise.resolve();
  const actions = {
    begin: async ({ wasm, bytes }) => { model = await Model.make(wasm, bytes); },
    part: ({ offset, part }) => model.write(offset, part),
    open: () => {
      model.open();
      const { arrays, ...facts } = model.header;
      port.postMessage({ kind: "ready", facts });
    },
    generate: async ({ prompt, turns, settings }) => {
      const { vocabulary, header } = model;
      const tokens = turns ? chatPrompt(header, vocabulary, turns) : vocabulary.prompt(prompt);
      const emit = (token, text) => port.postMessage({ kind: "token", token, text });
      port.postMessage({ kind: "end", ...(await generate(model, tokens, settings, emit, () => stopped)) });
    },
  };
  port.onmessage = ({ data }) => {
    if (data.kind === "stop" || data.kind === "generate") stopped = data.kind === "stop";
    if (data.kind !== "stop") work = work.then(() => actions[data.kind](data)).catch((error) => port.postMessage({ kind: "problem", text: sentence(error) }));
  };
  port.postMessage({ kind: "hello" });
}

function sentence(error) {
  if (error instanceof Problem) return error.message;
  if (error instanceof RangeError || /memory/i.test(error.message)) return "This device has too little memory for the model.";
  return `The model failed: ${error.message}`;
}
