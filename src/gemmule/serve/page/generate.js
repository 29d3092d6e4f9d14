// A generation: what was asked of the model, and its tokens as they come.

import { ask, events } from "./api.js";
import { SETTINGS } from "./settings.js";
import { makeId } from "./tree.js";

export const ALTERNATIVES = 8;

// The fields of a request that settings stand for; what is empty is left to the server.
export function requestOf(settings, model) {
  const body = { model, logprobs: ALTERNATIVES, return_token_ids: true };
  for (const [name] of SETTINGS) if ((settings[name] ?? "") !== "") body[name] = Number(settings[name]);
  const texts = (settings.stop ?? "").split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
  if (texts.length) body.stop = texts;
  return body;
}

// The seed of the settings, or one that is drawn here, where several replies are to have the same.
export const seedOf = ({ seed }) => (seed === "" ? Math.floor(Math.random() * 2 ** 32) : Number(seed));

// A generation that has not begun.
export function start(request) {
  return {
    id: makeId(), model: request.model, fingerprint: null, seed: request.seed ?? null, request, prompt_ids: [],
    tokens: [], finish: null, usage: null, timings: null, created: new Date().toISOString(),
  };
}

// Stream the reply to a text or to token ids into a generation; `onTokens` is called whenever tokens came. Whatever
// ends the stream, the generation holds what came before.
export async function stream(generation, prompt, signal, onTokens = () => {}) {
  const body = {
    ...generation.request, prompt, stream: true, stream_options: { include_usage: true }, timings: true,
  };
  const characters = [];
  const offsets = [];
  for await (const { choices, seed, system_fingerprint: fingerprint, usage, timings } of events(
    "/v1/completions", body, signal,
  )) {
    generation.seed = seed;
    generation.fingerprint = fingerprint;
    if (usage) generation.usage = usage;
    if (timings) generation.timings = timings;
    for (const choice of choices) {
      if (choice.prompt_token_ids) generation.prompt_ids = choice.prompt_token_ids;
      if (choice.finish_reason) generation.finish = choice.finish_reason;
      characters.push(...choice.text);
      if (choice.logprobs) addTokens(generation, choice, offsets);
    }
    retext(generation, characters, offsets);
    onTokens();
  }
}

function addTokens(generation, { logprobs, token_ids: ids }, offsets) {
  logprobs.tokens.forEach((_, number) => {
    const found = logprobs.top_logprobs[number];
    const known = logprobs.top_token_ids[number];
    const top = Object.entries(found).map(([text, logprob]) => ({ text, logprob, id: known[text] }));
    top.sort((one, other) => other.logprob - one.logprob);
    generation.tokens.push({ id: ids[number], text: "", logprob: logprobs.token_logprobs[number], top });
    offsets.push(logprobs.text_offset[number]);
  });
}

// A token's text ends where the next one's begins; the last one has what is left, which may still grow.
function retext(generation, characters, offsets) {
  const { tokens } = generation;
  for (let number = tokens.length - 1, settled = 0; number >= 0 && settled < 2; number -= 1) {
    const text = characters.slice(offsets[number], offsets[number + 1] ?? characters.length).join("");
    settled = text === tokens[number].text && text ? settled + 1 : 0;
    tokens[number].text = text;
  }
}

// How likely the model found each token of a text.
export async function score(text, model, signal) {
  const body = { model, prompt: text, echo: true, logprobs: ALTERNATIVES, max_tokens: 0 };
  const { choices: [{ logprobs }] } = await ask("/v1/completions", body, signal);
  const characters = [...text];
  const places = logprobs.text_offset;
  let unit = 0;
  return places.flatMap((place, number) => {
    const own = characters.slice(place, places[number + 1] ?? characters.length).join("");
    const begin = unit;
    unit += own.length;
    if (logprobs.token_logprobs[number] === null) return own ? [{ start: begin, end: unit, logprob: 0, top: [] }] : [];
    const top = Object.entries(logprobs.top_logprobs[number]).map(([each, logprob]) => ({ text: each, logprob }));
    top.sort((one, other) => other.logprob - one.logprob);
    return [{ start: begin, end: unit, logprob: logprobs.token_logprobs[number], top }];
  });
}
