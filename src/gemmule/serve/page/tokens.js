// Tokens as elements, and the panel of alternatives.

const LIMITS = [1, 2, 3, 4.5, 6, 8, 10]; // bits

export const level = (logprob) => LIMITS.filter((limit) => -logprob / Math.LN2 >= limit).length;

export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)}%` : share >= 0.1 ? `${share.toFixed(1)}%` : `${share.toPrecision(1)}%`;
}

export function element(tag, fields = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("aria-") || name.startsWith("data-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// The text of a token is only ever set as text.
export function tokenElement(token) {
  return element("span", { class: `t b${level(token.logprob)}${token.chosen ? " chosen" : ""}`, textContent: token.text });
}

// White space made visible.
export function visible(text) {
  return text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replace(/^ | $/gu, "\u2423") || "\u2205";
}

// What cannot be chosen: parts of characters, and tokens that are no text.
export const isText = (text) => !/\\x[0-9a-f]{2}|^<(eos|bos|pad|unk|start_of_turn|end_of_turn)>$/u.test(text);

// Show a token with its alternatives; `choose` gets the one that is taken.
export function showToken(panel, token, choose) {
  panel.replaceChildren();
  if (!token) {
    panel.append(element("p", { class: "note", textContent: "Put the cursor into the model's text, or touch a word of it." }));
    return;
  }
  const own = element("span", { class: "word", textContent: visible(token.text) });
  panel.append(element("p", {}, own, ` had a probability of ${percent(token.logprob)}.`));
  const list = element("ul", { class: "alternatives", "aria-label": "Alternatives" });
  for (const each of token.top) {
    const current = each.id === undefined ? each.text === token.text : each.id === token.id;
    const button = element(
      "button", { type: "button", disabled: !isText(each.text) || !choose },
      element("bdi", { textContent: visible(each.text) }), element("span", { textContent: percent(each.logprob) }),
    );
    if (current) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => choose(each, current));
    list.append(element("li", {}, button));
  }
  panel.append(list);
}
