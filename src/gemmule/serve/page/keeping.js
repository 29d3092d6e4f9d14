// How texts are kept: saved a moment after each change, undone, exported and imported.

import { problem, state, status } from "./state.js";
import { exported, imported, saveSheet } from "./store.js";
import { element } from "./tokens.js";
import { makeId } from "./tree.js";

const SAVE_AFTER = 300; // milliseconds
const UNDO_STEPS = 100;
const UNDO_PAUSE = 800;
const CHARACTER = 2; // UTF-16 units at most

let saving = 0;

// Save the sheet that is shown, so many milliseconds from now.
export function changed(after = SAVE_AFTER) {
  state.sheet.changed = Date.now();
  saving ||= setTimeout(() => save(), after);
}

export async function save(sheet = state.sheet) {
  dropSave();
  try {
    await saveSheet(sheet);
  } catch (error) {
    problem(`The browser does not keep this text (${error.message}); export it.`);
  }
}

export function saveNow() {
  if (saving) save();
}

export function dropSave() {
  clearTimeout(saving);
  saving = 0;
}

// Edits can be undone until something else is done, of which the tree keeps what was there before.
let undone = [];
let last = { time: 0 };

// Keep what is there before a change. Characters that are typed, or deleted, one after the other are one step.
export function keepUndo(begin, end, inserted) {
  const now = Date.now();
  const { nodes, current } = state.sheet;
  const typed = inserted.length > 0;
  const small = end - begin <= CHARACTER && inserted.length <= CHARACTER;
  if (!small || now - last.time > UNDO_PAUSE || end !== last.place || typed !== last.typed) {
    undone.push({ nodes: structuredClone(nodes), current });
    if (undone.length > UNDO_STEPS) undone.shift();
  }
  last = { time: now, place: begin + inserted.length, typed };
}

export function forgetUndo() {
  undone = [];
  last = { time: 0 };
}

// Take the last edit back; whether there was one.
export function undo() {
  const before = undone.pop();
  Object.assign(state.sheet, before);
  last.time = 0;
  return Boolean(before);
}

export function exportAll() {
  const address = URL.createObjectURL(new Blob([exported(state.sheets)], { type: "application/json" }));
  element("a", { href: address, download: "gemmule-sheets.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), SAVE_AFTER);
}

// Add the texts of a file; returns the last one.
export async function importFile(file) {
  try {
    const sheets = imported(await file.text());
    for (const sheet of sheets) {
      // Beside what is here, never in its place.
      if (state.sheets.some(({ id }) => id === sheet.id)) sheet.id = makeId();
      state.sheets.push(sheet);
      await saveSheet(sheet);
    }
    problem("");
    status(`Imported ${sheets.length} ${sheets.length === 1 ? "text" : "texts"}.`);
    return sheets.at(-1);
  } catch (error) {
    problem(error.message);
    return null;
  }
}
