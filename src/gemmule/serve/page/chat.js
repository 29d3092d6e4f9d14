// A conversation: turns of yours and of the model, each with what can be done about it.

import { turnsOf, turnText } from "./prompts.js";
import { element, renew, tokenElement } from "./tokens.js";
import { tokensOf } from "./tree.js";

export class Chat {
  // `token` gets what is touched, `go` a node to go to, `answer` a turn of yours that the model answers, `add` a node
  // and the text that is to follow it.
  constructor(list, actions) {
    Object.assign(this, actions);
    this.list = list;
    this.spans = new Map();
    list.addEventListener("click", (event) => this.mark(event.target.closest(".t")));
    list.addEventListener("keydown", (event) => this.walk(event));
  }

  show(sheet, running) {
    this.sheet = sheet;
    this.spans.clear();
    const turns = turnsOf(sheet);
    const focused = this.list.contains(document.activeElement);
    this.list.replaceChildren(...turns.map((turn, number) => this.turn(turn, number === turns.length - 1, running)));
    if (focused) this.list.lastChild?.querySelector(".reply").focus({ preventScroll: true });
  }

  turn(turn, last, running) {
    const { role, nodes } = turn;
    const user = role === "user";
    const reply = element("div", { class: "reply text", tabIndex: user ? -1 : 0 });
    if (!user) {
      reply.setAttribute("role", "group");
      reply.setAttribute("aria-label", "Reply; arrow keys walk its tokens");
    }
    for (const node of nodes) this.fill(reply, node, 0);
    const tools = element("div", { class: "tools" });
    if (!running) tools.append(...this.tools(turn, last, reply));
    return element(
      "li", { class: `turn ${role}` }, element("h2", { textContent: user ? "You" : "Model" }), reply, tools,
    );
  }

  fill(reply, node, from) {
    if (!node.generation) {
      reply.append(node.text);
      return;
    }
    tokensOf(this.sheet, node).slice(from).forEach((token, number) => {
      const made = tokenElement(token);
      this.spans.set(made, { token, node, index: node.from + from + number });
      reply.append(made);
    });
  }

  tools(turn, last, reply) {
    const user = turn.role === "user";
    const [first] = turn.nodes;
    const parent = this.sheet.nodes[first.parent];
    const made = [button("Edit", () => this.rewrite(turn, reply))];
    if (!user) made.push(button("Regenerate", () => this.answer(parent)));
    else if (last) made.push(button("Answer", () => this.answer(turn.nodes.at(-1))));
    if (!user && last) made.push(button("Continue", () => this.resume()));
    const { children } = parent;
    if (children.length > 1) {
      const place = children.indexOf(first.id);
      const step = (by) => () => this.go(children[(place + by + children.length) % children.length]);
      const before = button("\u2039", step(-1));
      const after = button("\u203a", step(1));
      before.setAttribute("aria-label", "Previous branch");
      after.setAttribute("aria-label", "Next branch");
      made.push(before, `${place + 1} of ${children.length}`, after);
    }
    return made;
  }

  // A turn in other words, as a branch of its own; the model answers yours.
  rewrite(turn, reply) {
    const user = turn.role === "user";
    const label = `${user ? "Your message" : "The reply"} in other words`;
    const input = element("textarea", { value: turnText(this.sheet, turn), rows: 3, "aria-label": label });
    const keep = button(user ? "Send as a branch" : "Keep as a branch", () => {
      const text = input.value.trim();
      if (text) this.add(this.sheet.nodes[turn.nodes[0].parent], user ? "you" : "model", text);
    });
    reply.replaceChildren(element("div", { class: "field" }, input), keep, " ", button("Cancel", () => this.show(this.sheet, false)));
    input.focus();
  }

  // Add tokens that came at the end of a node.
  extend(sheet, node) {
    const known = renew(this.spans, node);
    if (known) this.fill(this.list.lastChild.querySelector(".reply"), node, known);
    else this.show(sheet, true);
  }

  walk(event) {
    const reply = event.target.closest(".reply");
    if (!reply || event.target !== reply || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    event.preventDefault();
    const all = [...reply.querySelectorAll(".t")];
    const here = all.findIndex((each) => each.classList.contains("here"));
    const step = event.key === "ArrowLeft" ? -1 : 1;
    this.mark(all[Math.max(0, Math.min(all.length - 1, here + step))]);
  }

  // Give the focus to the reply that has the marked token.
  focus() {
    this.list.querySelector(".reply:has(.here)")?.focus();
  }

  mark(made) {
    if (!made) return;
    this.list.querySelector(".here")?.classList.remove("here");
    made.classList.add("here");
    this.token(this.spans.get(made));
  }
}

function button(text, action) {
  const made = element("button", { type: "button", textContent: text });
  made.addEventListener("click", action);
  return made;
}
