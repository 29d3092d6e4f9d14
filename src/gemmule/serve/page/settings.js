// Settings with their meaning.

import { element } from "./tokens.js";

export const SETTINGS = [
  ["max_tokens", "Tokens at most", "How many tokens one press of Continue adds.", { min: 1, step: 1 }],
  ["min_tokens", "Tokens at least", "Before so many the model cannot end its reply.", { min: 0, step: 1 }],
  ["temperature", "Temperature", "0 takes the likeliest token, 1 draws as the model says, above 1 flattens.", { min: 0, step: "any" }],
  ["top_k", "Top k", "Draw among the k likeliest tokens; 0 keeps all.", { min: 0, step: 1 }],
  ["top_p", "Top p", "Draw among the likeliest tokens that together reach this probability; 1 keeps all.", { min: 0.001, max: 1, step: "any" }],
  ["min_p", "Min p", "Leave out tokens less likely than this share of the likeliest one; 0 keeps all.", { min: 0, max: 0.999, step: "any" }],
  ["repetition_penalty", "Repetition penalty", "Above 1 makes tokens of prompt and reply less likely.", { min: 0.01, step: "any" }],
  ["presence_penalty", "Presence penalty", "Subtracted from the logits of tokens that the reply has.", { min: -2, max: 2, step: "any" }],
  ["frequency_penalty", "Frequency penalty", "The same, times how often they occur there.", { min: -2, max: 2, step: "any" }],
  ["seed", "Seed", "The same seed repeats a reply; each further one at the same place adds 1. Empty draws one, which is kept with the text.", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 }],
];
const SYSTEM = "What a chat begins with, before the first message.";
const STOP = "The reply ends before one of these texts, one a line; \\n stands for a line break.";

export const DEFAULTS = {
  max_tokens: "80", min_tokens: "", temperature: "0.8", top_k: "", top_p: "0.95", min_p: "", repetition_penalty: "", presence_penalty: "",
  frequency_penalty: "", seed: "", stop: "", system: "",
};

export function numberInput(name, limits, value, placeholder = "") {
  return element("input", { type: "number", name, inputMode: "decimal", autocomplete: "off", value, placeholder, ...limits });
}

export function showSettings(box, values, change) {
  box.replaceChildren();
  const add = (label, input, meaning) => {
    const note = element("small", { id: `about-${input.name}`, textContent: meaning });
    input.setAttribute("aria-describedby", note.id);
    input.addEventListener("change", () => {
      const valid = input.checkValidity();
      input.setAttribute("aria-invalid", String(!valid));
      if (valid) change(input.name, input.value);
      else input.reportValidity();
    });
    box.append(element("div", { class: "field" }, element("label", {}, label, input), note));
  };
  for (const [name, label, meaning, limits] of SETTINGS) add(label, numberInput(name, limits, values[name] ?? ""), meaning);
  add("Stop texts", element("textarea", { name: "stop", rows: 2, value: values.stop ?? "" }), STOP);
  add("System", element("textarea", { name: "system", rows: 2, value: values.system ?? "" }), SYSTEM);
}
