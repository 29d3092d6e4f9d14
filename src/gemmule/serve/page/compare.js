// Two replies to the same text: with two settings, two seeds, or by two models.

import { requestOf, seedOf, start, stream } from "./generate.js";
import { SETTINGS, numberInput } from "./settings.js";
import { element, partsAt, replyElements } from "./tokens.js";

const VARIED = SETTINGS.filter(([name]) => name !== "seed");

export class Comparison {
  // `keep` gets a generation and the place that `run` was given.
  constructor(box, { keep }) {
    this.box = box;
    this.keep = keep;
    this.sides = [];
  }

  show(models, settings) {
    this.sides = ["Left", "Right"].map((name) => this.side(name, models, settings));
    this.box.replaceChildren(...this.sides.map(({ made }) => made));
  }

  // Show what the empty fields stand for.
  settingChanged(name, value) {
    for (const { inputs } of this.sides) for (const input of inputs) if (input.name === name) input.placeholder = value;
  }

  side(name, models, settings) {
    const select = element("select", {}, element("option", { value: "", textContent: "as above" }));
    select.append(...models.map(({ id }) => element("option", { value: id, textContent: id })));
    const inputs = VARIED.map(([field, label, , limits]) => {
      const input = numberInput(field, limits, "", settings[field]);
      return [input, element("label", { class: "field" }, label, input)];
    });
    const reply = element("div", { class: "reply text" });
    const about = element("p", { class: "note" });
    const keep = element("button", { type: "button", textContent: "Keep as a branch", disabled: true });
    const side = { select, inputs: inputs.map(([input]) => input), reply, about, keep, generation: null, place: null };
    keep.addEventListener("click", () => {
      keep.disabled = true;
      this.keep(side.generation, side.place);
    });
    side.made = element(
      "section", { class: "side", "aria-label": name }, element("h3", { textContent: name }),
      element("label", { class: "field" }, "Model", select),
      element("details", {}, element("summary", { textContent: "Settings of this side" }), element("div", { class: "inputs" }, ...inputs.map(([, field]) => field))),
      reply, about, keep,
    );
    return side;
  }

  // `promptFor` gives what a model reads.
  async run({ promptFor, place, settings, twoSamples, model, models, signal }) {
    const { sides } = this;
    const seed = seedOf(settings);
    const replies = await Promise.all(sides.map(async ({ select, inputs }, number) => {
      const own = Object.fromEntries(inputs.filter((input) => input.value).map((input) => [input.name, input.value]));
      const chosen = models.find(({ id }) => id === select.value) ?? model;
      const prompt = await promptFor(chosen);
      return [start(requestOf({ ...settings, ...own, seed: (seed + (twoSamples ? number : 0)) % Number.MAX_SAFE_INTEGER }, chosen.id)), prompt];
    }));
    sides.forEach((side, number) => {
      [side.generation] = replies[number];
      side.place = place;
      side.keep.disabled = true;
    });
    let frame = 0;
    const drawSoon = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        draw(sides);
      });
    };
    try {
      await Promise.all(replies.map(([generation, prompt]) => stream(generation, prompt, signal, drawSoon)));
    } finally {
      cancelAnimationFrame(frame);
      draw(sides);
      for (const { keep, generation } of sides) {
        generation.finish ??= "stopped";
        keep.disabled = !generation.tokens.length;
      }
    }
  }
}

// Draw both, and frame the first tokens that differ, once both are there.
function draw(sides) {
  const parts = partsAt(...sides.map(({ generation }) => generation.tokens));
  const known = sides.every(({ generation: { finish, tokens } }) => finish || parts < tokens.length);
  for (const { reply, about, generation: { seed, tokens } } of sides) {
    reply.replaceChildren(...replyElements(tokens, known ? parts : null));
    about.textContent = `${tokens.length} tokens, seed ${seed}`;
  }
}
