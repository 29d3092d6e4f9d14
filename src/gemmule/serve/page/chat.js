// A conversation: turns of yours and of the model, each with what can be done about it.

import { element, tokenElement } from "./tokens.js";
import { addNode, idsTo, pathOf, textOf, tokensOf } from "./tree.js";

export class Chat {
  // `token` gets what is touched, `go` a node to go to, `answer` a turn of yours to be answered.
  constructor(list, actions) {
    Object.assign(this, actions);
    this.list = list;
    this.spans = new Map();
    list.addEventListener("click", (event) => this.mark(event.target.closest(".t")));
    list.addEventListener("keydown", (event) => this.walk(event));
  }

  turns(sheet) {
    const turns = [];
    for (const node of pathOf(sheet)) {
      if (node.id === sheet.root) continue;
      const role = node.generation ? "assistant" : "user";
      if (turns.at(-1)?.role === "assistant" && role === "assistant") turns.at(-1).nodes.push(node);
      else turns.push({ role, nodes: [node] });
    }
    return turns;
  }

  messages(sheet) {
    return this.turns(sheet).map(({ role, nodes }) => (
      { role, content: nodes.map((node) => textOf(sheet, node)).join("") }
    ));
  }

  show(sheet, running) {
    this.sheet = sheet;
    this.spans.clear();
    const turns = this.turns(sheet);
    this.list.replaceChildren(...turns.map((turn, number) => this.turn(turn, number === turns.length - 1, running)));
  }

  turn({ role, nodes }, last, running) {
    const user = role === "user";
    const reply = element("div", { class: "reply text", tabIndex: user ? -1 : 0 });
    if (!user) {
      reply.setAttribute("role", "group");
      reply.setAttribute("aria-label", "Reply; arrow keys walk its tokens");
    }
    for (const node of nodes) this.fill(reply, node, 0);
    const tools = element("div", { class: "tools" });
    if (!running) tools.append(...this.tools(user, nodes, last, reply));
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

  tools(user, nodes, last, reply) {
    const button = (text, action) => {
      const made = element("button", { type: "button", textContent: text });
      made.addEventListener("click", action);
      return made;
    };
    const [first] = nodes;
    const parent = this.sheet.nodes[first.parent];
    const made = [];
    if (user) made.push(button("Edit", () => this.rewrite(first, reply)));
    else made.push(button("Regenerate", () => this.answer(parent)));
    if (!user && last && idsTo(this.sheet)) made.push(button("Continue", () => this.resume()));
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

  // Your turn in other words, as a branch of its own.
  rewrite(node, reply) {
    const input = element("textarea", { value: node.text, rows: 3, "aria-label": "Your message in other words" });
    const send = element("button", { type: "button", textContent: "Send as a branch" });
    send.addEventListener("click", () => {
      const text = input.value.trim();
      if (text) this.answer(addNode(this.sheet, this.sheet.nodes[node.parent], { by: "you", text }));
    });
    reply.replaceChildren(element("div", { class: "field" }, input), send);
    input.focus();
  }

  // Add tokens that came at the end.
  extend(sheet, node, generation, known) {
    if (!known) {
      this.show(sheet, true);
      return;
    }
    for (const made of [...this.spans.keys()].slice(-4)) {
      const { token } = this.spans.get(made);
      if (made.textContent !== token.text) made.textContent = token.text;
    }
    this.fill(this.list.lastChild.querySelector(".reply"), node, known);
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

  mark(made) {
    if (!made) return;
    this.list.querySelector(".here")?.classList.remove("here");
    made.classList.add("here");
    this.token(this.spans.get(made));
  }
}
