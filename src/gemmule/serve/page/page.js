// What the page does: texts, replies, and what stands beside them.

import { ask, setKey } from "./api.js";
import { neighbor, showBranches } from "./branches.js";
import { Chat } from "./chat.js";
import { Comparison } from "./compare.js";
import { Editor } from "./editor.js";
import { showFigures, warnBeyond } from "./figures.js";
import { requestOf, score, start, stream } from "./generate.js";
import { growing } from "./growing.js";
import { changed, dropSave, exportAll, forgetUndo, importFile, keepUndo, save, saveNow, undo } from "./keeping.js";
import { promptAt } from "./prompts.js";
import { DEFAULTS, showSettings } from "./settings.js";
import { $, model, problem, state, status } from "./state.js";
import { Steps } from "./steps.js";
import { deleteSheet, loadSheets } from "./store.js";
import { element, showToken } from "./tokens.js";
import {
  addNode, branchOf, choose, deleteBranch, edit, goTo, newSheet, nodeAt, pathOf, pathText, remember,
} from "./tree.js";

const SAVE_STREAM_AFTER = 3000; // milliseconds
const TRY_AFTER = 3000;

const editor = new Editor($("editor"), {
  change: (begin, end, inserted) => {
    keepUndo(begin, end, inserted);
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
  answer: (turn) => answer(turn),
  resume: () => run(),
  add: (parent, by, text) => add(parent, by, text),
});
const comparison = new Comparison($("sides"), { keep });
const steps = new Steps({ list: $("steps-list"), status: $("steps-status") }, {
  keep,
  changed: (sheet) => {
    if (sheet === state.sheet) steps.show(sheet, state.models);
    save(sheet);
  },
});

// --- What is shown

function show() {
  const { sheet } = state;
  const chats = sheet.mode === "chat";
  $("sheet-view").hidden = chats;
  $("chat-view").hidden = !chats;
  $("surprise").hidden = $("again").hidden = $("own-legend").hidden = chats;
  $("go").textContent = chats ? "Send" : "Continue";
  if (chats) chat.show(sheet, Boolean(state.running));
  else editor.show(sheet, state.surprise);
  showBranches($("branches"), sheet, visit);
  const branch = branchOf(sheet);
  $("branch-tools").hidden = branch.id === sheet.root;
  $("branch-name").value = branch.name ?? "";
  if (!$("editor").contains(document.activeElement)) showToken($("token"), null);
  showFacts();
}

// What depends on the model, and what is opened; the text stays as it is.
function showFacts() {
  $("through-steps").hidden = !model()?.run && !state.sheet.steps;
  for (const [button, view] of [["compare", "compare-view"], ["through-steps", "steps-view"]]) {
    $(view).hidden = $(button).hidden || $(button).getAttribute("aria-pressed") !== "true";
  }
  showFigures($("figures"), state.sheet, model(), state.rate);
  warnBeyond($("beyond"), state.sheet, model());
}

function showModels() {
  const labels = state.models.map(({ id, followed, step }) => (followed ? `${id}, step ${step}` : id));
  const options = [...$("model").options];
  const chosen = $("model").value || state.sheet?.model;
  if (options.length === labels.length && options.every(({ value }, number) => value === state.models[number].id)) {
    options.forEach((option, number) => { option.textContent = labels[number]; });
  } else {
    $("model").replaceChildren(...state.models.map(({ id }, number) => element("option", { value: id, textContent: labels[number] })));
    if (state.models.some(({ id }) => id === chosen)) $("model").value = chosen;
    $("new-chat").hidden = !state.models.some(({ chats }) => chats);
    if (state.sheet) comparison.show(state.models, state.sheet.settings);
  }
  if (state.sheet) showFacts();
}

function showSheets() {
  const sorted = [...state.sheets].sort((one, other) => other.created - one.created);
  $("sheets").replaceChildren(...sorted.map(({ id, title }) => element("option", { value: id, textContent: title })));
  $("sheets").value = state.sheet.id;
  $("title").value = state.sheet.title;
}

function open(sheet) {
  stop();
  steps.leave();
  saveNow();
  Object.assign(state, { sheet, surprise: [] });
  forgetUndo();
  localStorage.setItem("gemmule-open", sheet.id);
  if (state.models.some(({ id }) => id === sheet.model)) $("model").value = sheet.model;
  showSettings($("settings"), sheet.settings, (name, value) => {
    sheet.settings[name] = value;
    comparison.settingChanged(name, value);
    changed();
  });
  showSheets();
  comparison.show(state.models, sheet.settings);
  show();
  follow();
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
  if (error.away) {
    state.away = true;
    waitForServer();
  }
}

// Add the model's reply after a node, by default after the text that is shown; `prompt` is what it reads, by default
// the text up to there.
async function run(parent = state.sheet.nodes[state.sheet.current], prompt = null) {
  if (state.running) return;
  const served = model();
  if (!served) {
    await connect();
    return;
  }
  const { sheet } = state;
  const running = new AbortController();
  const request = requestOf(sheet.settings, served.id);
  // With the same seed, another reply at the same place would be the same one.
  if ("seed" in request) request.seed = (request.seed + parent.children.length) % Number.MAX_SAFE_INTEGER;
  forgetUndo();
  setRunning(running);
  problem("");
  status("The model is writing.");
  const generation = start(request);
  try {
    const given = prompt ?? await promptAt(sheet, parent.id, served, running.signal);
    await stream(generation, given, running.signal, growing(sheet, parent, generation, {
      draw: (node) => sheet === state.sheet && extend(node, generation),
      grown: (rate) => {
        state.rate = rate;
        changed(SAVE_STREAM_AFTER);
      },
    }));
    const { finish, tokens: { length } } = generation;
    status(`${length} tokens; ${finish === "length" ? "the limit is reached" : "the model ended it"}.`);
  } catch (error) {
    status(error.name === "AbortError" ? `Stopped after ${generation.tokens.length} tokens.` : "");
    failed(error);
  } finally {
    generation.finish ??= "stopped";
    setRunning(null);
    remember(sheet);
    if (sheet === state.sheet) settle();
    await save(sheet);
  }
  const { fingerprint } = generation;
  if (fingerprint && fingerprint !== served.fingerprint) await connect(); // a newer checkpoint, or another server
}

function extend(node, generation) {
  const paper = $("editor");
  const below = paper.scrollHeight - paper.scrollTop - paper.clientHeight < 60;
  if (state.sheet.mode === "chat") chat.extend(state.sheet, node);
  else editor.extend(node, generation.tokens);
  showFacts();
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
  for (const id of ["go", "again", "surprise", "run-both", "steps-begin", "delete-branch"]) $(id).disabled = Boolean(running);
}

const stop = () => state.running?.abort();

const proceed = () => (state.sheet.mode === "chat" ? send() : run());

// Another reply in place of the last one.
function again() {
  const { sheet } = state;
  const path = pathOf(sheet);
  const last = path.findLast((node) => node.generation && !sheet.generations[node.generation].chosen);
  if (!last || !model()) return;
  const first = path.find((node) => node.generation === last.generation);
  const { fingerprint, prompt_ids: ids } = sheet.generations[last.generation];
  run(sheet.nodes[first.parent], fingerprint === model().fingerprint ? ids : null);
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
  await run();
}

// Where replies side by side and through the steps begin: at the end of a sheet, or at your last message of a chat.
function place() {
  const { sheet } = state;
  const node = sheet.mode === "chat" ? pathOf(sheet).findLast(({ id, by }) => by === "you" && id !== sheet.root) : sheet.nodes[sheet.current];
  if (!node) status("Send a message first.");
  return node && { node: node.id, text: pathText(sheet, node.id) };
}

// Keep a reply as a branch at the place where it began, also where the text has grown since.
function keep(generation, { node, text }) {
  const { sheet } = state;
  const parent = sheet.mode === "chat" ? sheet.nodes[node] : nodeAt(sheet, text);
  if (state.running || !parent) {
    if (!parent) status("The text that this reply continues is no longer here.");
    return;
  }
  forgetUndo();
  sheet.generations[generation.id] = generation;
  const there = parent.children.find((id) => sheet.nodes[id].generation === generation.id && !sheet.nodes[id].from);
  goTo(sheet, there ?? addNode(sheet, parent, { by: "model", generation: generation.id, from: 0, to: generation.tokens.length }).id);
  show();
  changed();
}

// --- Chat

// Send your message, or have the last one answered that has no reply yet.
function send() {
  const text = $("message").value.trim();
  const last = state.sheet.nodes[state.sheet.current];
  if (state.running || !model()) return;
  $("message").value = "";
  if (text) add(last, "you", text);
  else if (last.by === "you" && last.id !== state.sheet.root) answer(last);
}

// Add a turn after a node; the model answers yours.
function add(parent, by, text) {
  if (state.running || (by === "you" && !model())) return;
  const turn = addNode(state.sheet, parent, { by, text });
  if (by === "you") answer(turn);
  else visit(turn.id);
}

function answer(turn) {
  if (state.running || !model()) return;
  state.sheet.current = turn.id;
  show();
  changed();
  run(turn);
}

function takeBack() {
  if (state.running || !undo()) return;
  show();
  editor.select(editor.text.length);
  changed();
}

// --- The server

let waiting = 0;
function waitForServer() {
  clearTimeout(waiting);
  waiting = setTimeout(connect, TRY_AFTER);
}

async function connect() {
  clearTimeout(waiting);
  try {
    ({ data: state.models } = await ask("/v1/models"));
  } catch (error) {
    failed(error);
    return;
  }
  if (state.away) problem("");
  state.away = false;
  showModels();
  document.body.dataset.connected = "true";
  if (state.sheet) await follow();
}

// Let the checkpoints of the sheet's run reply that have not, and look for newer ones while the page is open.
async function follow() {
  const { sheet } = state;
  steps.show(sheet, state.models);
  try {
    await steps.update(sheet, state.models);
  } catch (error) {
    if (error.name !== "AbortError" && !error.away) steps.stop(sheet);
    failed(error);
  }
  if (sheet !== state.sheet) return;
  steps.show(sheet, state.models);
  if (steps.follows(sheet, state.models)) waitForServer();
}

async function beginSteps() {
  const at = place();
  if (!model()?.run || !at) return;
  try {
    steps.begin(state.sheet, { prompt: await promptAt(state.sheet, at.node, model()), place: at, model: model() });
  } catch (error) {
    failed(error);
    return;
  }
  await follow();
}

function askKey(message) {
  $("key-problem").textContent = `${message.split(";")[0]}. It is kept until the tab is closed.`;
  $("key").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
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
    else if (event.target.closest(".turn textarea")) chat.show(state.sheet, false);
    else if ($("token").contains(document.activeElement)) (state.sheet.mode === "chat" ? chat : editor).focus();
  } else if (event.altKey && event.key === "ArrowDown" && event.target.nodeName !== "SELECT") {
    event.preventDefault();
    if (event.target === $("editor")) editor.moved();
    $("token").querySelector("button:not(:disabled)")?.focus();
  } else if (event.altKey && (event.key === "PageUp" || event.key === "PageDown")) {
    event.preventDefault();
    visit(neighbor(state.sheet, event.key === "PageUp" ? -1 : 1));
  } else if (event.key === "z" && (event.ctrlKey || event.metaKey) && document.activeElement === $("editor")) {
    event.preventDefault();
    takeBack();
  }
}

async function tintMine() {
  const pressed = !state.surprise.length;
  try {
    state.surprise = pressed && editor.text && model() ? await score(editor.text, model().id) : [];
  } catch (error) {
    failed(error);
  }
  $("surprise").setAttribute("aria-pressed", String(state.surprise.length > 0));
  show();
}

async function runBoth() {
  const { sheet, models } = state;
  const at = place();
  if (state.running || !model() || !at) return;
  const running = new AbortController();
  setRunning(running);
  status("Both are writing.");
  try {
    await comparison.run({
      place: at, settings: sheet.settings, twoSamples: $("two-samples").checked, model: model(), models, signal: running.signal,
      promptFor: (served) => promptAt(sheet, at.node, served, running.signal),
    });
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
  onClick("close-token", () => {
    editor.mark(null);
    showToken($("token"), null);
  });
  onClick("surprise", tintMine);
  onClick("run-both", runBoth);
  for (const id of ["compare", "through-steps"]) {
    onClick(id, () => {
      $(id).setAttribute("aria-pressed", String($(id).getAttribute("aria-pressed") !== "true"));
      showFacts();
    });
  }
  onClick("steps-begin", beginSteps);
  onClick("steps-stop", () => {
    steps.stop(state.sheet);
    steps.show(state.sheet, state.models);
    changed();
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
    dropSave();
    state.sheets = state.sheets.filter(({ id }) => id !== sheet.id);
    await deleteSheet(sheet.id);
    if (state.sheets.length) open(state.sheets.at(-1));
    else begin("sheet");
  });
  $("file").addEventListener("change", async () => {
    const sheet = await importFile($("file").files[0]);
    $("file").value = "";
    if (sheet) open(sheet);
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
    showFacts();
    changed();
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key-dialog").close();
    connect();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", saveNow);
  document.addEventListener("visibilitychange", () => document.hidden && saveNow());
}

listen();
state.sheets = await loadSheets().catch((error) => {
  problem(`The browser keeps no texts here (${error.message}); export what you write.`);
  return [];
});
await connect();
const last = state.sheets.find(({ id }) => id === localStorage.getItem("gemmule-open")) ?? state.sheets.at(-1);
if (last) open(last);
else begin("sheet");
$("settings-box").open = matchMedia("(min-width: 60rem)").matches;
document.body.dataset.ready = "true";
