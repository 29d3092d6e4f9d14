// What the page does: texts, replies, and what stands beside them.

import { ask, setKey } from "./api.js";
import { neighbor, showBranches } from "./branches.js";
import { Chat } from "./chat.js";
import { Comparison } from "./compare.js";
import { Editor } from "./editor.js";
import { requestOf, score, start, stream } from "./generate.js";
import { DEFAULTS, showSettings } from "./settings.js";
import { deleteSheet, exported, imported, loadSheets, saveSheet } from "./store.js";
import { element, showToken } from "./tokens.js";
import {
  addNode, branchOf, choose, deleteBranch, edit, goTo, idsTo, makeId, newSheet, pathOf, pathText, remember,
} from "./tree.js";

const $ = (id) => document.getElementById(id);
const state = {
  models: [], sheets: [], sheet: null, running: null, surprise: [], undo: [], undone: { time: 0, place: 0 }, rate: 0, away: false,
};
const SAVE_AFTER = 300; // milliseconds
const SAVE_STREAM_AFTER = 3000;
const DRAW_SHARE = 3;
const TRY_AFTER = 3000;
const UNDO_STEPS = 100;
const UNDO_PAUSE = 800;

const model = () => state.models.find(({ id }) => id === $("model").value) ?? state.models[0];
const status = (text) => { $("status").textContent = text; };

const editor = new Editor($("editor"), {
  change: (begin, end, inserted) => {
    keepUndo(end, begin + inserted.length);
    edit(state.sheet, begin, end, inserted);
    remember(state.sheet);
    state.surprise = state.surprise.filter((each) => each.end <= begin);
    show();
    changed();
  },
  move: (found) => showToken($("token"), found?.token, found && !state.running && ((each, same) => take(found, each, same))),
});
const chat = new Chat($("turns"), {
  token: (found) => showToken($("token"), found?.token, found && !state.running && ((each, same) => take(found, each, same))),
  go: (id) => visit(id),
  answer: (parent) => answer(parent),
  resume: () => run(idsTo(state.sheet)),
});
const comparison = new Comparison($("sides"), {
  keep: (generation) => {
    const { sheet } = state;
    forgetUndo();
    sheet.generations[generation.id] = generation;
    const parent = sheet.nodes[sheet.current];
    sheet.current = addNode(sheet, parent, { by: "model", generation: generation.id, from: 0, to: generation.tokens.length }).id;
    remember(sheet);
    show();
    changed();
  },
});

// --- What is kept

let saving = 0;
function changed(after = SAVE_AFTER) {
  state.sheet.changed = Date.now();
  saving ||= setTimeout(() => save(), after);
}

async function save(sheet = state.sheet) {
  clearTimeout(saving);
  saving = 0;
  try {
    await saveSheet(sheet);
  } catch (error) {
    problem(`The browser does not keep this text (${error.message}); export it.`);
  }
}

// Edits can be undone until something else is done, of which the tree keeps what was there before.
function keepUndo(begin, end) {
  const now = Date.now();
  const { nodes, current, generations } = state.sheet;
  if (now - state.undone.time > UNDO_PAUSE || begin !== state.undone.place) {
    state.undo.push({ nodes: structuredClone(nodes), current, generations: { ...generations } });
    if (state.undo.length > UNDO_STEPS) state.undo.shift();
  }
  state.undone = { time: now, place: end };
}

function forgetUndo() {
  state.undo = [];
  state.undone = { time: 0, place: 0 };
}

function undo() {
  const before = state.undo.pop();
  if (!before || state.running) return;
  Object.assign(state.sheet, before);
  state.undone.time = 0;
  show();
  editor.select(editor.text.length);
  changed();
}

// --- What is shown

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function show() {
  const { sheet } = state;
  const chats = sheet.mode === "chat";
  $("sheet-view").hidden = chats;
  $("chat-view").hidden = !chats;
  $("surprise").hidden = $("compare").hidden = $("again").hidden = $("own-legend").hidden = chats;
  $("compare-view").hidden = chats || $("compare").getAttribute("aria-pressed") !== "true";
  $("go").textContent = chats ? "Send" : "Continue";
  if (chats) chat.show(sheet, Boolean(state.running));
  else editor.show(sheet, state.surprise);
  showBranches($("branches"), sheet, visit);
  const branch = branchOf(sheet);
  $("branch-tools").hidden = branch.id === sheet.root;
  $("branch-name").value = branch.name ?? "";
  if (!$("editor").contains(document.activeElement)) showToken($("token"), null);
  showFigures();
}

function showFigures() {
  const generation = state.sheet.generations[state.sheet.nodes[state.sheet.current].generation];
  const facts = [];
  if (generation && !generation.chosen) {
    const { usage, timings, seed, finish, fingerprint } = generation;
    const rate = timings?.predicted_per_second ?? state.rate;
    const used = usage?.total_tokens ?? generation.prompt_ids.length + generation.tokens.length;
    facts.push(["Tokens a second", rate ? rate.toFixed(1) : "\u2013"], ["Context used", used]);
    facts.push(["of it cached", usage?.prompt_tokens_details.cached_tokens ?? "\u2013"]);
    if (model()) facts.push(["Context left", Math.max(0, model().context - used)]);
    facts.push(["Seed", seed ?? "\u2013"], ["Ended by", { stop: "stop", length: "length" }[finish] ?? "\u2013"]);
    facts.push(["Model", generation.model], ["Fingerprint", fingerprint ?? "\u2013"]);
  } else if (model()) {
    facts.push(["Context", model().context], ["Parameters", model().parameters.toLocaleString("en")]);
    facts.push(["Format", model().format], ["Repeatable", model().reproducible ? "bit for bit" : "not promised"]);
  }
  $("figures").replaceChildren(...facts.map(([name, value]) => element(
    "div", {}, element("dt", { textContent: name }), element("dd", { textContent: String(value) }),
  )));
}

function showSheets() {
  const sorted = [...state.sheets].sort((one, other) => other.created - one.created);
  $("sheets").replaceChildren(...sorted.map(({ id, title }) => element("option", { value: id, textContent: title })));
  $("sheets").value = state.sheet.id;
  $("title").value = state.sheet.title;
}

function open(sheet) {
  stop();
  if (saving) save();
  Object.assign(state, { sheet, surprise: [] });
  forgetUndo();
  localStorage.setItem("gemmule-open", sheet.id);
  if (state.models.some(({ id }) => id === sheet.model)) $("model").value = sheet.model;
  showSettings($("settings"), sheet.settings, (name, value) => {
    sheet.settings[name] = value;
    changed();
  });
  showSheets();
  comparison.show(state.models, sheet.settings);
  show();
}

function begin(mode) {
  const title = `${mode === "chat" ? "Chat" : "Sheet"} ${state.sheets.length + 1}`;
  const sheet = newSheet(mode, title, state.sheet?.settings ?? DEFAULTS);
  sheet.model = model()?.id;
  state.sheets.push(sheet);
  open(sheet);
  changed();
  (mode === "chat" ? $("message") : $("editor")).focus();
}

function visit(id) {
  if (state.running) return;
  forgetUndo();
  goTo(state.sheet, id);
  state.surprise = [];
  show();
  changed();
}

// --- Replies

function failed(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) {
    askKey(error.message);
    return;
  }
  problem(error.message);
  if (error.code === "unreachable" || error.status === 503) {
    state.away = true;
    waitForServer();
  }
}

// Continue from the current end, or from ids; the reply becomes a child of `parent`.
async function run(prompt, parent = state.sheet.nodes[state.sheet.current]) {
  if (state.running) return;
  if (!model()) {
    await connect();
    return;
  }
  const { sheet } = state;
  const running = new AbortController();
  const request = requestOf(sheet.settings, model().id);
  // With the same seed, another reply at the same place would be the same one.
  if ("seed" in request) request.seed = (request.seed + parent.children.length) % Number.MAX_SAFE_INTEGER;
  const generation = start(prompt, request);
  let node = null;
  let began = 0;
  let shown = 0;
  let timer = 0;
  let pause = 0;
  const draw = () => {
    timer = 0;
    const before = performance.now();
    if (sheet === state.sheet) extend(node, generation, shown);
    shown = node.to;
    // A long text is laid out slowly: what draws takes a quarter of the time at most.
    pause = DRAW_SHARE * (performance.now() - before);
  };
  forgetUndo();
  setRunning(running);
  problem("");
  status("The model is writing.");
  const tokens = () => {
    if (!generation.tokens.length) return;
    began ||= performance.now();
    state.rate = (generation.tokens.length - 1) / ((performance.now() - began) / 1000) || 0;
    if (!node) {
      sheet.generations[generation.id] = generation;
      node = addNode(sheet, parent, { by: "model", generation: generation.id, from: 0, to: 0 });
      sheet.current = node.id;
    }
    node.to = generation.tokens.length;
    timer ||= setTimeout(draw, pause);
    changed(SAVE_STREAM_AFTER);
  };
  try {
    await stream(generation, prompt, running.signal, tokens);
    const { finish, tokens: { length } } = generation;
    status(`${length} tokens; ${finish === "length" ? "the limit is reached" : "the model ended it"}.`);
  } catch (error) {
    status(error.name === "AbortError" ? `Stopped after ${generation.tokens.length} tokens.` : "");
    failed(error);
  } finally {
    clearTimeout(timer);
    generation.finish ??= "stopped";
    setRunning(null);
    remember(sheet);
    if (sheet === state.sheet) settle();
    await save(sheet);
  }
}

function extend(node, generation, known) {
  const paper = $("editor");
  const below = paper.scrollHeight - paper.scrollTop - paper.clientHeight < 60;
  if (state.sheet.mode === "chat") chat.extend(state.sheet, node, generation, known);
  else editor.extend(node, generation.tokens, known);
  showFigures();
  if (below) paper.scrollTop = paper.scrollHeight; // which lays out, too
}

// Show what a reply left, with the cursor where it was or, after a reply, at its end.
function settle() {
  const { activeElement } = document;
  show();
  if (activeElement === $("editor")) editor.select(editor.text.length);
}

function setRunning(running) {
  state.running = running;
  editor.locked = Boolean(running);
  $("stop").disabled = !running;
  for (const id of ["go", "again", "surprise", "run-both", "delete-branch"]) $(id).disabled = Boolean(running);
}

const stop = () => state.running?.abort();

function proceed() {
  if (state.sheet.mode === "chat") return send();
  return run(idsTo(state.sheet) ?? pathText(state.sheet));
}

// Another reply in place of the last one.
function again() {
  const { sheet } = state;
  const path = pathOf(sheet);
  const last = path.findLast((node) => node.generation && !sheet.generations[node.generation].chosen);
  if (!last || state.running) return;
  const first = path.find((node) => node.generation === last.generation);
  run(sheet.generations[last.generation].prompt_ids, sheet.nodes[first.parent]);
}

async function take(found, alternative, same) {
  if (same) return;
  const { sheet } = state;
  if (!found.node) {
    editor.apply(found.place, found.end, alternative.text);
    return;
  }
  forgetUndo();
  choose(sheet, found.node, found.index, alternative);
  remember(sheet);
  show();
  changed();
  if (sheet.mode === "sheet") {
    $("editor").focus();
    editor.select(editor.text.length);
  }
  await run(idsTo(sheet));
}

// --- Chat

async function send() {
  const text = $("message").value.trim();
  if (!text || state.running) return;
  const parent = state.sheet.nodes[state.sheet.current];
  const turn = addNode(state.sheet, parent, { by: "you", text });
  $("message").value = "";
  await answer(turn);
}

async function answer(turn) {
  if (state.running || !model()) return;
  state.sheet.current = turn.id;
  show();
  changed();
  try {
    const messages = chat.messages(state.sheet);
    const { tokens } = await ask("/tokenize", { model: model().id, messages });
    await run(tokens, turn);
  } catch (error) {
    failed(error);
  }
}

// --- The server

let waiting = 0;
function waitForServer() {
  clearTimeout(waiting);
  waiting = setTimeout(connect, TRY_AFTER);
}

async function connect() {
  try {
    const { data } = await ask("/v1/models");
    state.models = data;
  } catch (error) {
    failed(error);
    return;
  }
  const chosen = $("model").value || state.sheet?.model;
  $("model").replaceChildren(...state.models.map(({ id }) => element("option", { value: id, textContent: id })));
  if (state.models.some(({ id }) => id === chosen)) $("model").value = chosen;
  $("new-chat").hidden = !state.models.some(({ chats }) => chats);
  if (state.away) problem("");
  state.away = false;
  if (state.sheet) {
    comparison.show(state.models, state.sheet.settings);
    showFigures();
  }
  document.body.dataset.connected = "true";
}

function askKey(message) {
  $("key-problem").textContent = `${message.split(";")[0]}. It is kept until the tab is closed.`;
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// --- Files

function exportAll() {
  const address = URL.createObjectURL(new Blob([exported(state.sheets)], { type: "application/json" }));
  element("a", { href: address, download: "gemmule-sheets.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), SAVE_AFTER);
}

async function importFile(file) {
  try {
    const sheets = imported(await file.text());
    for (const sheet of sheets) {
      // Beside what is here, never in its place.
      if (state.sheets.some(({ id }) => id === sheet.id)) sheet.id = makeId();
      state.sheets.push(sheet);
      await saveSheet(sheet);
    }
    if (sheets.length) open(sheets.at(-1));
    status(`Imported ${sheets.length} ${sheets.length === 1 ? "text" : "texts"}.`);
  } catch (error) {
    problem(error.message);
  }
}

// --- Events

function onClick(id, action) {
  $(id).addEventListener("click", action);
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    proceed();
  } else if (event.key === "Escape" && !$("key-dialog").open) {
    if (state.running) stop();
    else if ($("token").contains(document.activeElement)) $("editor").focus();
  } else if (event.altKey && event.key === "ArrowDown" && event.target.nodeName !== "SELECT") {
    event.preventDefault();
    $("token").querySelector("button:not(:disabled)")?.focus();
  } else if (event.altKey && (event.key === "PageUp" || event.key === "PageDown")) {
    event.preventDefault();
    visit(neighbor(state.sheet, event.key === "PageUp" ? -1 : 1));
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey) && document.activeElement === $("editor")) {
    event.preventDefault();
    undo();
  }
}

async function tintMine() {
  const pressed = !state.surprise.length;
  try {
    state.surprise = pressed && editor.text ? await score(editor.text, model().id) : [];
  } catch (error) {
    failed(error);
  }
  $("surprise").setAttribute("aria-pressed", String(state.surprise.length > 0));
  show();
}

async function runBoth() {
  if (state.running || !model()) return;
  const running = new AbortController();
  setRunning(running);
  status("Both are writing.");
  try {
    await comparison.run(idsTo(state.sheet), pathText(state.sheet), state.sheet.settings, model().id, running.signal);
    status("Both are done.");
  } catch (error) {
    status(error.name === "AbortError" ? "Stopped." : "");
    failed(error);
  } finally {
    setRunning(null);
  }
}

function listen() {
  onClick("go", proceed);
  onClick("stop", stop);
  onClick("again", again);
  onClick("surprise", tintMine);
  onClick("run-both", runBoth);
  onClick("compare", () => {
    const pressed = $("compare").getAttribute("aria-pressed") !== "true";
    $("compare").setAttribute("aria-pressed", String(pressed));
    show();
  });
  onClick("new-sheet", () => begin("sheet"));
  onClick("new-chat", () => begin("chat"));
  onClick("export", exportAll);
  onClick("import", () => $("file").click());
  onClick("delete-branch", () => {
    forgetUndo();
    deleteBranch(state.sheet, branchOf(state.sheet).id);
    show();
    changed();
  });
  onClick("delete-sheet", async () => {
    const { sheet } = state;
    if (!confirm(`Delete ${sheet.title} with all its branches?`)) return;
    stop();
    clearTimeout(saving);
    saving = 0;
    state.sheets = state.sheets.filter(({ id }) => id !== sheet.id);
    await deleteSheet(sheet.id);
    if (state.sheets.length) open(state.sheets.at(-1));
    else begin("sheet");
  });
  $("file").addEventListener("change", () => {
    importFile($("file").files[0]);
    $("file").value = "";
  });
  $("branch-name").addEventListener("change", () => {
    branchOf(state.sheet).name = $("branch-name").value.trim() || undefined;
    show();
    changed();
  });
  $("title").addEventListener("change", () => {
    state.sheet.title = $("title").value.trim() || "Untitled";
    showSheets();
    changed();
  });
  $("sheets").addEventListener("change", () => open(state.sheets.find(({ id }) => id === $("sheets").value)));
  $("model").addEventListener("change", () => {
    state.sheet.model = $("model").value;
    showFigures();
    changed();
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key-dialog").close();
    connect();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => saving && save());
  document.addEventListener("visibilitychange", () => document.hidden && saving && save());
}

listen();
state.sheets = await loadSheets();
await connect();
const last = state.sheets.find(({ id }) => id === localStorage.getItem("gemmule-open")) ?? state.sheets.at(-1);
if (last) open(last);
else begin("sheet");
$("settings-box").open = matchMedia("(min-width: 60rem)").matches;
document.body.dataset.ready = "true";
