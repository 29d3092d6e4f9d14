// Tokens as elements, and the panel of alternatives.

const LIMITS = [1, 2, 3, 4.5, 6, 8, 10]; // bits

// How strong the tint of a token is; a file may leave its probability out.
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

// Renew the last tokens that are shown, whose text may have grown; returns how many of a node are.
export function renew(spans, node) {
  const last = [...spans].slice(-4);
  for (const [made, { token }] of last) if (made.textContent !== token.text) made.textContent = token.text;
  const shown = last.at(-1)?.[1];
  return shown?.node === node ? shown.index + 1 : 0;
}

// White space made visible.
export function visible(text) {
  return text.replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5").replace(/^ | $/gu, "\u2423") || "\u2205";
}

// What cannot be chosen: parts of characters, and tokens that are no text.
export const isText = (text) => !/\\x[0-9a-f]{2}|^<(eos|bos|pad|unk|start_of_turn|end_of_turn)>$/u.test(text);

// How many tokens two replies have in common at their beginning; null where they are the same.
export function partsAt(one, other) {
  const most = Math.min(one.length, other.length);
  let count = 0;
  while (count < most && one[count].text === other[count].text) count += 1;
  return count === one.length && count === other.length ? null : count;
}

// A reply as elements; the token from which on it differs from another one is framed.
export function replyElements(tokens, parts = null) {
  return tokens.map((token, number) => {
    const made = tokenElement(token);
    if (number === parts) made.classList.add("parts");
    return made;
  });
}

// Show a token with its alternatives; `choose` gets the one that is taken.
export function showToken(panel, token, choose) {
  panel.replaceChildren();
  if (!token) {
    panel.append(element("p", { class: "note", textContent: "Put the cursor into the model's text, or touch a word of it." }));
    return;
  }
  const own = element("span", { class: "word", textContent: visible(token.text) });
  const known = typeof token.logprob === "number";
  panel.append(element("p", {}, own, known ? ` had a probability of ${percent(token.logprob)}.` : " came without its probability."));
  if (!token.top.length) return;
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
