// The tree of branches as nested lists of buttons.

import { element } from "./tokens.js";
import { branchOf, leaves, pathOf, textOf } from "./tree.js";

const SHOWN = 60;

function label(sheet, id) {
  let node = sheet.nodes[id];
  if (node.name) return node.name;
  let text = textOf(sheet, node);
  while (text.length < SHOWN && node.children.length === 1) {
    node = sheet.nodes[node.children[0]];
    text += textOf(sheet, node);
  }
  return text.trim().slice(0, SHOWN) || "(no text)";
}

export function showBranches(panel, sheet, go) {
  const onPath = new Set(pathOf(sheet).map((node) => node.id));
  const chosen = branchOf(sheet).id;
  const list = (ids) => element("ul", {}, ...ids.map((id) => {
    const button = element("button", { type: "button", textContent: label(sheet, id), "data-node": id });
    if (id === chosen) button.setAttribute("aria-current", "true");
    if (onPath.has(id)) button.classList.add("yours");
    button.addEventListener("click", () => go(id));
    const below = forks(sheet, id);
    return element("li", {}, button, ...(below.length ? [list(below)] : []));
  }));
  const first = forks(sheet, sheet.root);
  const focused = panel.contains(document.activeElement);
  if (first.length) panel.replaceChildren(list(first));
  else panel.replaceChildren(element("p", { class: "note", textContent: "None yet. Choosing an alternative, another reply, or changing what the model said begins one." }));
  if (focused) panel.querySelector("[aria-current]")?.focus();
}

// The children of the next fork at or below a node.
function forks(sheet, id) {
  let node = sheet.nodes[id];
  while (node.children.length === 1) node = sheet.nodes[node.children[0]];
  return node.children;
}

// The end of the branch before or after the current one.
export function neighbor(sheet, direction) {
  const ends = leaves(sheet);
  const path = new Set(pathOf(sheet).map((node) => node.id));
  const here = ends.findIndex((id) => id === sheet.current);
  const place = here >= 0 ? here : ends.findIndex((id) => pathOf(sheet, id).some((node) => path.has(node.id)));
  return ends[(place + direction + ends.length) % ends.length];
}
