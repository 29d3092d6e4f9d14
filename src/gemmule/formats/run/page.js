"use strict";
/* The page around runtime.js: loads the model's parts, sends prompts to the runtime, shows what comes back. */

const byId = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "max_tokens", "seed"];

const state = { port: null, failed: false, chat: false, turns: [], reply: null, seed: 0 };

addEventListener("DOMContentLoaded", () => {
  byId("go").onclick = begin;
  byId("stop").onclick = () => state.port.postMessage({ kind: "stop" });
  byId("text-mode").onclick = () => setMode(false);
  byId("chat-mode").onclick = () => setMode(true);
  byId("new-chat").onclick = clearChat;
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("go").disabled) begin();
    if (event.key === "Escape" && !byId("stop").disabled) byId("stop").click();
  });
  load().catch((error) => fail(sentence(error)));
});

/* ---- loading ---- */

async function load() {
  const manifest = json("manifest"), wasm = byId("wasm");
  if (!manifest || !wasm) throw new Problem(INCOMPLETE);
  if (!hasSimd()) throw new Problem(NO_SIMD);
  const machine = decode(wasm);
  if ((await sha256(machine)) !== manifest.wasm) throw new Problem(DAMAGED);
  const port = (state.port = await connect());
  port.onmessage = ({ data }) => answers[data.kind]?.(data);
  port.postMessage({ kind: "begin", wasm: machine, bytes: manifest.bytes });
  byId("progress").max = manifest.bytes;
  let offset = 0;
  for (const [index, part] of manifest.parts.entries()) {
    const which = `Part ${index + 1} of ${manifest.parts.length} of the model`;
    const progress = (bytes) => { byId("progress").value = offset + bytes; };
    const bytes = part.file ? await fetchPart(part, which, progress) : await embeddedPart(index, which);
    if (bytes.length !== part.bytes || (await sha256(bytes)) !== part.sha256)
      throw new Problem(`${which}${part.file ? ` (${part.file})` : ""} is damaged; ${AGAIN}`);
    progress(bytes.length);
    offset += bytes.length;
    port.postMessage({ kind: "part", offset: offset - bytes.length, part: bytes }, [bytes.buffer]);
  }
  port.postMessage({ kind: "open" });
}

const AGAIN = "copy the page again, or export it again.";
const INCOMPLETE = `The end of this page is missing; ${AGAIN}`;
const DAMAGED = `This page is damaged; ${AGAIN}`;

function json(id) {
  return JSON.parse(byId(id)?.textContent ?? "null");
}

/* The bytes in a script element, which is freed. */
function decode(element) {
  const text = element.textContent.trim();
  element.remove();
  try {
    return decodeBase64(text);
  } catch {
    throw new Problem(DAMAGED);
  }
}

async function embeddedPart(index, which) {
  const element = byId(`part-${index}`);
  if (!element) throw new Problem(`${which} is missing; ${AGAIN}`);
  await new Promise((resolve) => setTimeout(resolve));  // for the progress to be shown
  return decode(element);
}

async function fetchPart({ file, bytes }, which, progress) {
  if (location.protocol === "file:")
    throw new Problem("Browsers read the parts of this page from a web server alone: run  python3 -m http.server  in its folder.");
  const response = await fetch(file).catch(() => null);
  if (!response?.ok) throw new Problem(`${which} (${file}) is missing: ${response ? `the server answers ${response.status}` : "it cannot be fetched"}.`);
  const whole = new Uint8Array(bytes), reader = response.body.getReader();
  for (let at = 0, next; ; at += next.value.length, progress(at)) {
    next = await reader.read().catch(() => { throw new Problem(`${which} (${file}) was interrupted; load the page again.`); });
    if (next.done) return whole.subarray(0, at);
    if (at + next.value.length > bytes) return new Uint8Array(0);  // longer than it should be
    whole.set(next.value, at);
  }
}

/* A port to the runtime: in a Worker, or where that is refused on this thread. */
function connect() {
  return new Promise((resolve) => {
    const here = () => {
      const { port1, port2 } = new MessageChannel();
      serve(port2);
      resolve(port1);
    };
    try {
      const source = new Blob([byId("runtime").textContent, "\nserve(self);"], { type: "text/javascript" });
      const worker = new Worker(URL.createObjectURL(source));
      worker.onerror = (event) => (event.preventDefault(), here());
      worker.onmessage = () => {
        worker.onerror = () => fail("The model failed in this browser: load the page again.");
        resolve(worker);
      };
    } catch {
      here();
    }
  });
}

/* ---- one reply ---- */

function begin() {
  const text = byId(state.chat ? "message" : "prompt").value;
  problem("");
  try {
    if (!text.trim()) throw new Problem(state.chat ? "The message is empty: write one." : "The prompt is empty: write how the text begins.");
    const settings = readSettings();
    state.seed = settings.seed;
    if (state.chat) state.turns.push({ role: "user", text });
    state.port.postMessage({ kind: "generate", settings, ...(state.chat ? { turns: state.turns } : { prompt: text }) });
  } catch (error) {
    problem(sentence(error));
    return;
  }
  state.reply = document.createTextNode("");
  if (state.chat) {
    showTurn("user", document.createTextNode(text));
    showTurn("model", state.reply);
    byId("message").value = "";
  } else {
    const prompt = document.createElement("b");
    prompt.className = "yours";
    prompt.textContent = text;
    byId("reply").replaceChildren(prompt, state.reply);
  }
  setBusy(true);
}

/* The settings of the controls; a Problem where one is out of range. */
function readSettings() {
  const settings = {};
  for (const name of NUMBERS) {
    const input = byId(name), label = input.labels[0].firstChild.data.trim();
    if (!input.checkValidity()) throw new Problem(`${label}: ${input.validationMessage}`);
    settings[name] = input.value === "" ? NaN : Number(input.value);
    if (name !== "seed" && Number.isNaN(settings[name])) throw new Problem(`${label}: write a number.`);
  }
  if (Number.isNaN(settings.seed)) settings.seed = crypto.getRandomValues(new Uint32Array(1))[0];
  settings.stop = byId("stop-texts").value.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
  return settings;
}

const answers = {
  ready: ({ facts }) => {
    showFacts(facts);
    byId("loading").hidden = true;
    byId("modes").hidden = !(facts.chat && facts.start_of_turn >= 0 && facts.end_of_turn >= 0);
    setBusy(false);
  },
  token: ({ text }) => {
    const box = byId("reply"), follows = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
    state.reply.appendData(text);
    if (follows) box.scrollTop = box.scrollHeight;
  },
  end: ({ reason, tokens, seconds }) => {
    const speed = tokens > 1 && seconds > 0 ? `, ${format(tokens / seconds)} tokens per second` : "";
    const how = { stop: "finished", length: "reached the most tokens", stopped: "stopped" }[reason];
    byId("status").textContent = `${how}: ${format(tokens)} tokens${speed}, seed ${state.seed}`;
    if (state.chat) state.turns.push({ role: "model", text: state.reply.data });
    setBusy(false);
  },
  problem: ({ text }) => {
    if (!state.reply) return fail(text);
    if (state.chat) {
      byId("message").value = state.turns.pop().text;
      byId("turns").lastChild.remove();
      byId("turns").lastChild.remove();
    }
    problem(text);
    setBusy(false);
  },
};

/* ---- what is shown ---- */

function format(number) {
  return number.toLocaleString("en", { maximumFractionDigits: number < 10 ? 1 : 0 });
}

function showFacts(facts) {
  const certificate = json("certificate"), size = facts.parameters;
  const parameters = size < 1e9 ? `${(size / 1e6).toFixed(1)} million` : `${(size / 1e9).toFixed(2)} billion`;
  byId("facts").textContent = `Gemma 3, ${parameters} parameters`;
  const rows = {
    Parameters: format(size), Weights: facts.dtype, Layers: facts.num_hidden_layers, Width: facts.hidden_size,
    Vocabulary: format(facts.vocab_size), Context: `${format(facts.max_position_embeddings)} tokens`,
  };
  byId("model").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const row = document.createElement("div"), term = document.createElement("dt"), fact = document.createElement("dd");
    term.textContent = name, fact.textContent = value;
    row.append(term, fact);
    return row;
  }));
  byId("certificate-text").textContent = certificate ? `Certificate: ${certificate}` : "Exported without --verify: no certificate.";
}

function showTurn(role, text) {
  const turn = document.createElement("li"), title = document.createElement("h2"), box = document.createElement("div");
  turn.className = `turn ${role}`, title.textContent = role === "user" ? "You" : "Model", box.className = "text reply";
  box.append(text);
  turn.append(title, box);
  byId("turns").append(turn);
}

function setMode(chat) {
  state.chat = chat;
  byId("text-mode").setAttribute("aria-pressed", String(!chat));
  byId("chat-mode").setAttribute("aria-pressed", String(chat));
  byId("text-view").hidden = byId("reply").hidden = chat;
  byId("chat-view").hidden = byId("new-chat").hidden = !chat;
}

function clearChat() {
  state.turns = [];
  byId("turns").replaceChildren();
  byId("message").focus();
}

function setBusy(busy) {
  for (const id of ["go", "text-mode", "chat-mode", "new-chat"]) byId(id).disabled = busy;
  byId("stop").disabled = !busy;
  if (busy) byId("status").textContent = "generating ...";
  else if (!state.turns.length && !state.reply) byId("status").textContent = "";
}

function problem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
  if (text && state.port) byId("status").textContent = "";
}

/* The model cannot be used; the first reason counts. */
function fail(text) {
  if (state.failed) return;
  state.failed = true;
  problem(text);
  byId("loading").hidden = true;
  for (const button of document.querySelectorAll("main button")) button.disabled = true;
}
