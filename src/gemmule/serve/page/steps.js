// One prompt and seed through the checkpoints of a run, by their steps.

import { requestOf, seedOf, start, stream } from "./generate.js";
import { element, partsAt, replyElements } from "./tokens.js";
import { forgetUnused } from "./tree.js";

// The checkpoints of a run that the server has, by their steps; the final model, which has none, comes last.
const checkpointsOf = (models, run) => models.filter((each) => each.run === run).sort((one, other) => stepOf(one) - stepOf(other));

const stepOf = ({ step }) => step ?? Infinity;

const nameOf = ({ step, model }) => (step === null ? model : `step ${step.toLocaleString("en")}`);

export class Steps {
  // `changed` gets the sheet when its replies changed, `keep` gets a generation and its place.
  constructor({ list, status }, { changed, keep }) {
    Object.assign(this, { list, status, changed, keep });
    this.asking = null;
  }

  // Begin with what a model of a run reads at a place; replaces what the sheet has.
  begin(sheet, { prompt, place, model }) {
    this.stop(sheet);
    const request = requestOf({ ...sheet.settings, seed: seedOf(sheet.settings) }, model.id);
    sheet.steps = { run: model.run, following: true, prompt, place, request, replies: [] };
    forgetUnused(sheet);
    this.changed(sheet);
  }

  stop(sheet) {
    this.leave();
    if (sheet.steps) sheet.steps.following = false;
  }

  // Ask no more for now; what is being asked is asked again by the next update.
  leave() {
    this.asking?.abort();
    this.asking = null;
  }

  // Whether newer checkpoints are to be looked for.
  follows(sheet, models) {
    return Boolean(sheet.steps?.following) && models.some(({ run, followed }) => followed && run === sheet.steps.run);
  }

  // Let every checkpoint reply that has not yet; one at a time.
  async update(sheet, models) {
    const { steps } = sheet;
    if (!steps?.following || this.asking) return;
    const asking = new AbortController();
    this.asking = asking;
    try {
      for (const served of checkpointsOf(models, steps.run)) {
        if (!this.known(sheet, served)) await this.reply(sheet, served, asking.signal);
      }
    } finally {
      if (this.asking === asking) this.asking = null;
    }
  }

  known(sheet, { fingerprint }) {
    return sheet.steps.replies.some(({ generation }) => sheet.generations[generation].fingerprint === fingerprint);
  }

  async reply(sheet, { id, step, fingerprint }, signal) {
    const { steps } = sheet;
    const generation = start({ ...steps.request, model: id });
    this.status.textContent = `${nameOf({ step, model: id })} is writing.`;
    await stream(generation, steps.prompt, signal);
    // A newer checkpoint may have taken its place before it was asked; that one's turn comes.
    if (generation.fingerprint !== fingerprint || sheet.steps !== steps) return;
    sheet.generations[generation.id] = generation;
    steps.replies.push({ step, model: id, generation: generation.id });
    steps.replies.sort((one, other) => stepOf(one) - stepOf(other));
    this.changed(sheet);
  }

  show(sheet, models) {
    const { steps } = sheet;
    this.list.replaceChildren(...(steps?.replies ?? []).map((reply, number, all) => this.item(sheet, reply, all[number - 1])));
    if (this.asking) return;
    if (!steps) this.status.textContent = "";
    else if (this.follows(sheet, models)) this.status.textContent = `Waits for the next checkpoint of ${steps.run}.`;
    else if (steps.following) this.status.textContent = `These are all checkpoints of ${steps.run} that the server has.`;
    else this.status.textContent = "Does not follow the run.";
  }

  item(sheet, reply, before) {
    const generation = sheet.generations[reply.generation];
    const { tokens } = generation;
    const parts = before ? partsAt(sheet.generations[before.generation].tokens, tokens) : null;
    const change = !before ? "" : parts === null ? `, the same as ${nameOf(before)}` : `, differs from ${nameOf(before)} at token ${parts + 1}`;
    const keep = element("button", { type: "button", textContent: "Keep as a branch" });
    keep.addEventListener("click", () => this.keep(generation, sheet.steps.place));
    return element(
      "li", { class: "side" }, element("h3", { textContent: nameOf(reply) }, element("span", { class: "note", textContent: change })),
      element("div", { class: "reply text" }, ...replyElements(tokens, parts)), keep,
    );
  }
}
