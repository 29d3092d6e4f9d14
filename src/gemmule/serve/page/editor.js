// The sheet in the browser: a plain text that is edited, with an element for each token.

import { element, level, renew, tokenElement } from "./tokens.js";
import { pathOf, textOf, tokensOf } from "./tree.js";

export class Editor {
  // `change(start, end, inserted)` gets each edit, `move(place)` what stands at the cursor, or null.
  constructor(root, { change, move }) {
    this.root = root;
    this.change = change;
    this.move = move;
    this.text = "";
    this.spans = new Map(); // element -> what it shows
    this.here = undefined; // the element at the cursor; null where none is, undefined where it is not known yet
    this.clicked = null; // the element of the last click, with the cursor that it made
    this.locked = false;
    root.addEventListener("beforeinput", (event) => this.beforeInput(event));
    root.addEventListener("input", (event) => event.isComposing || this.read());
    root.addEventListener("compositionend", () => this.read());
    root.addEventListener("click", ({ target }) => this.click(target));
    document.addEventListener("selectionchange", () => this.moved());
  }

  // Show the current path of a sheet; `surprise` has the scores of tokens of your text, by position.
  show(sheet, surprise = []) {
    this.spans.clear();
    this.here = undefined;
    const parts = [];
    let offset = 0;
    for (const node of pathOf(sheet)) {
      const text = textOf(sheet, node);
      if (node.generation) {
        tokensOf(sheet, node).forEach((token, number) => (
          parts.push(this.span(tokenElement(token), { token, node, index: node.from + number }))
        ));
      } else if (text) parts.push(...this.own(node, text, offset, surprise));
      offset += text.length;
    }
    this.root.replaceChildren(...parts);
    this.finish();
  }

  span(made, content) {
    this.spans.set(made, content);
    return made;
  }

  own(node, text, offset, surprise) {
    const kind = node.by === "you" ? "yours" : "model";
    const scored = surprise.filter((each) => each.end > offset && each.start < offset + text.length);
    if (!scored.length) return [element("span", { class: kind, textContent: text })];
    return scored.map((each) => {
      const start = Math.max(0, each.start - offset);
      const shown = text.slice(start, Math.min(text.length, each.end - offset));
      const made = element("span", { class: `${kind} t b${level(each.logprob)}`, textContent: shown });
      return this.span(made, { token: { ...each, text: shown }, place: offset + start, end: offset + start + shown.length });
    });
  }

  // Add tokens that came at the end of a node.
  extend(node, tokens) {
    const end = this.root.lastChild?.nodeName === "BR" ? this.root.lastChild : null;
    for (let index = renew(this.spans, node); index < tokens.length; index += 1) {
      const made = this.span(tokenElement(tokens[index]), { token: tokens[index], node, index });
      this.root.insertBefore(made, end);
    }
    this.finish();
  }

  finish() {
    this.text = this.root.textContent;
    // Without it a browser does not show an empty last line.
    if (this.text && this.root.lastChild?.nodeName !== "BR") this.root.append(document.createElement("br"));
  }

  beforeInput(event) {
    if (this.locked || event.inputType.startsWith("history") || event.inputType.startsWith("format")) {
      event.preventDefault();
      return;
    }
    if (event.isComposing) return;
    const inserted = {
      insertParagraph: "\n", insertLineBreak: "\n", insertText: event.data,
      insertFromPaste: event.dataTransfer?.getData("text/plain") ?? event.data,
    }[event.inputType];
    if (inserted === undefined || inserted === null) return;
    event.preventDefault();
    const [start, end] = this.selection();
    this.apply(start, end, inserted.replaceAll("\r\n", "\n"));
  }

  // Tell what the browser changed by itself: deletions, and what an input method composed.
  read() {
    const after = this.root.textContent;
    const before = this.text;
    if (after === before) return;
    const most = Math.min(before.length, after.length);
    let start = 0;
    while (start < most && before[start] === after[start]) start += 1;
    let same = 0;
    while (same < most - start && before.at(-1 - same) === after.at(-1 - same)) same += 1;
    this.apply(start, before.length - same, after.slice(start, after.length - same));
  }

  apply(start, end, inserted) {
    this.change(start, end, inserted);
    this.select(start + inserted.length);
  }

  offsetOf(container, offset) {
    const range = document.createRange();
    range.setStart(this.root, 0);
    range.setEnd(container, offset);
    return range.toString().length;
  }

  focus() {
    this.root.focus();
  }

  // Begin and end of the selection as positions in the text; its end where the sheet has no selection.
  selection() {
    const found = getSelection();
    if (!found.rangeCount || !this.root.contains(found.anchorNode)) return [this.text.length, this.text.length];
    const range = found.getRangeAt(0);
    const ends = [[range.startContainer, range.startOffset], [range.endContainer, range.endOffset]];
    return ends.map(([container, offset]) => Math.min(this.offsetOf(container, offset), this.text.length));
  }

  select(place) {
    const walker = document.createTreeWalker(this.root, NodeFilter.SHOW_TEXT);
    let left = place;
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (left <= node.length && (left < node.length || !node.data.endsWith("\n") || place < this.text.length)) {
        getSelection().collapse(node, left);
        return;
      }
      left -= node.length;
    }
    const last = this.root.lastChild;
    if (last?.nodeName === "BR") getSelection().collapse(this.root, this.root.childNodes.length - 1);
    else getSelection().collapse(this.root, this.root.childNodes.length);
  }

  // A click on the left half of a token puts the cursor behind the text before it: the token that was clicked is meant.
  click(target) {
    const { anchorNode, anchorOffset } = getSelection();
    this.clicked = this.spans.has(target) ? { target, anchorNode, anchorOffset } : null;
    this.moved();
  }

  moved() {
    const { anchorNode, anchorOffset } = getSelection();
    if (!anchorNode || !this.root.contains(anchorNode)) return;
    if (this.clicked?.anchorNode !== anchorNode || this.clicked.anchorOffset !== anchorOffset) this.clicked = null;
    let made = this.clicked?.target;
    made ??= anchorNode.nodeType === Node.TEXT_NODE ? anchorNode.parentNode : this.root.childNodes[anchorOffset];
    if (made === this.root) made = null;
    this.mark(this.spans.has(made) ? made : null);
  }

  // Mark the token at the cursor. What is shown of it stays as it is while the cursor stays there, since it may have the
  // focus.
  mark(made) {
    if (made === this.here) return;
    this.here?.classList.remove("here");
    made?.classList.add("here");
    this.here = made;
    this.move(made ? this.spans.get(made) : null);
  }
}
