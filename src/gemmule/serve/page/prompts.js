// What a model reads before it continues at a node.

import { ask } from "./api.js";
import { idsTo, pathOf, pathText, textOf } from "./tree.js";

// The turns of a chat up to a node; successive nodes of the model are one.
export function turnsOf(sheet, id = sheet.current) {
  const turns = [];
  for (const node of pathOf(sheet, id)) {
    if (node.id === sheet.root) continue;
    const role = node.by === "model" ? "assistant" : "user";
    if (turns.at(-1)?.role === "assistant" && role === "assistant") turns.at(-1).nodes.push(node);
    else turns.push({ role, nodes: [node] });
  }
  return turns;
}

export const turnText = (sheet, { nodes }) => nodes.map((node) => textOf(sheet, node)).join("");

// Token ids, or the text of a sheet whose ids this model does not know.
export async function promptAt(sheet, id, model, signal) {
  const ids = idsTo(sheet, id, model);
  if (ids) return ids;
  if (sheet.mode === "sheet") return pathText(sheet, id);
  const turns = turnsOf(sheet, id);
  const begun = turns.at(-1)?.role === "assistant" ? turnText(sheet, turns.pop()) : "";
  const messages = turns.map((turn) => ({ role: turn.role, content: turnText(sheet, turn) }));
  if (sheet.settings.system) messages.unshift({ role: "system", content: sheet.settings.system });
  const { tokens } = await ask("/tokenize", { model: model.id, messages }, signal);
  if (!begun) return tokens;
  const said = await ask("/tokenize", { model: model.id, prompt: begun, add_special_tokens: false }, signal);
  return [...tokens, ...said.tokens];
}
