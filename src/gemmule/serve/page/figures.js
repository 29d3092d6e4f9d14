// Figures of the last reply, or of the model where there is none.

import { element } from "./tokens.js";

const ENDS = { stop: "the model", length: "the limit", stopped: "you, or an error" };

// Tokens up to the end of the text that is shown; null where it ends with text that was never tokenized.
function tokensUsed(sheet) {
  const node = sheet.nodes[sheet.current];
  return node.generation ? sheet.generations[node.generation].prompt_ids.length + node.to : null;
}

export function showFigures(list, sheet, model, rate) {
  const generation = sheet.generations[sheet.nodes[sheet.current].generation];
  const used = tokensUsed(sheet);
  const facts = [];
  if (used !== null) {
    facts.push(["Context used", used]);
    if (model) facts.push(["Context left", Math.max(0, model.context - used)]);
  }
  if (generation && !generation.chosen) {
    const { usage, timings, seed, finish, fingerprint, request } = generation;
    const speed = timings?.predicted_per_second ?? rate;
    facts.push(["of it cached", usage?.prompt_tokens_details?.cached_tokens ?? "\u2013"]);
    facts.push(["Tokens per second", speed ? speed.toFixed(1) : "\u2013"]);
    facts.push(["Seed", seed ?? "\u2013"], ["Ended by", finish === "stop" && request?.stop ? "the model, or a stop text" : ENDS[finish] ?? "\u2013"]);
    facts.push(["Model", generation.model], ["Fingerprint", fingerprint ?? "\u2013"]);
  } else if (model) {
    if (used === null) facts.push(["Context", model.context]);
    facts.push(["Parameters", model.parameters.toLocaleString("en")], ["Format", model.format]);
    facts.push(["Repeatable", model.reproducible ? "bit for bit" : "not promised"]);
    if (model.step !== null) facts.push(["Step", model.step.toLocaleString("en")]);
    if (model.trained_context) facts.push(["Trained at", `${model.trained_context} tokens`]);
  }
  list.replaceChildren(...facts.map(([name, value]) => element(
    "div", {}, element("dt", { textContent: name }), element("dd", { textContent: String(value) }),
  )));
}

// Warn of a text that is longer than the sequences of training. The words stay the same while it grows, so that they
// are read out once.
export function warnBeyond(box, sheet, model) {
  const trained = model?.trained_context;
  const beyond = Boolean(trained) && tokensUsed(sheet) > trained;
  if (beyond) {
    box.textContent = `Text and reply are longer than the ${trained} tokens of a sequence in training. The model may write nonsense from there on.`;
  }
  box.hidden = !beyond;
}
