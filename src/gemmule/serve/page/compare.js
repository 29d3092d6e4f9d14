// Two replies to the same text with the same seed: at two settings, or by two models.

import { requestOf, start, stream } from "./generate.js";
import { limitsOf, numberInput } from "./settings.js";
import { element, tokenElement } from "./tokens.js";

const VARIED = [["temperature", "Temperature"], ["top_p", "Top p"], ["top_k", "Top k"], ["min_p", "Min p"]];

export class Comparison {
  constructor(box, { keep }) {
    this.box = box;
    this.keep = keep;
    this.sides = [];
  }

  show(models, settings) {
    this.sides = ["Left", "Right"].map((name) => this.side(name, models, settings));
    this.box.replaceChildren(...this.sides.map(({ made }) => made));
  }

  side(name, models, settings) {
    const select = element("select", {}, element("option", { value: "", textContent: "as above" }));
    select.append(...models.map(({ id }) => element("option", { value: id, textContent: id })));
    const inputs = VARIED.map(([field, label]) => {
      const input = numberInput(field, limitsOf(field), "", settings[field]);
      return [input, element("label", { class: "field" }, label, input)];
    });
    const reply = element("div", { class: "reply text" });
    const keep = element("button", { type: "button", textContent: "Keep as a branch", disabled: true });
    const side = { select, inputs: inputs.map(([input]) => input), reply, keep, generation: null };
    keep.addEventListener("click", () => {
      keep.disabled = true;
      this.keep(side.generation);
    });
    side.made = element(
      "section", { class: "side", "aria-label": name }, element("h3", { textContent: name }),
      element("label", { class: "field" }, "Model", select),
      element("div", { class: "inputs" }, ...inputs.map(([, field]) => field)), reply, keep,
    );
    return side;
  }

  async run(ids, text, settings, model, signal) {
    const seed = settings.seed === "" ? Math.floor(Math.random() * 2 ** 32) : Number(settings.seed);
    const replies = this.sides.map(({ select, inputs }) => {
      const own = Object.fromEntries(inputs.filter((input) => input.value).map((input) => [input.name, input.value]));
      const chosen = select.value || model;
      // Another model may have another vocabulary.
      const prompt = ids && chosen === model ? ids : text;
      return [start(prompt, requestOf({ ...settings, ...own, seed }, chosen)), prompt];
    });
    this.sides.forEach((side, number) => {
      side.generation = replies[number][0];
      side.keep.disabled = true;
      side.reply.replaceChildren();
    });
    let frame = 0;
    const draw = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        this.draw();
      });
    };
    try {
      await Promise.all(replies.map(([generation, prompt]) => stream(generation, prompt, signal, draw)));
    } finally {
      cancelAnimationFrame(frame);
      this.draw();
      for (const { keep, generation } of this.sides) keep.disabled = !generation.tokens.length;
    }
  }

  // Draw both, and frame the first tokens that differ.
  draw() {
    const [left, right] = this.sides.map(({ generation }) => generation.tokens);
    const same = left.findIndex((token, number) => right[number] && right[number].text !== token.text);
    for (const { reply, generation } of this.sides) {
      reply.replaceChildren(...generation.tokens.map((token, number) => {
        const made = tokenElement(token);
        if (number === same) made.classList.add("parts");
        return made;
      }));
    }
  }
}
