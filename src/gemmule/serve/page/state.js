// What the parts of the page share.

export const state = {
  models: [], // as /v1/models lists them
  sheets: [],
  sheet: null, // the one that is shown
  running: null, // ends the reply that is being written
  surprise: [], // scores of your own text
  rate: 0, // tokens per second of the last reply
  away: false, // whether the server cannot be reached
};

export const $ = (id) => document.getElementById(id);

export const model = () => state.models.find(({ id }) => id === $("model").value) ?? state.models[0];

export const status = (text) => { $("status").textContent = text; };

export function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}
