// A sheet: a tree of pieces of text, yours and the model's, and the generations that the model's came from.
// Positions in text are UTF-16 units, as the browser counts.

export const makeId = () => Math.random().toString(36).slice(2, 12).padEnd(10, "0");

export function newSheet(mode, title, settings) {
  const root = makeId();
  const now = Date.now();
  return {
    id: makeId(), title, mode, created: now, changed: now, settings: { ...settings },
    nodes: { [root]: { id: root, parent: null, children: [], by: "you", text: "" } },
    root, current: root, generations: {},
  };
}

export function textOf(sheet, node) {
  return node.generation ? tokensOf(sheet, node).map((token) => token.text).join("") : node.text;
}

export function tokensOf(sheet, node) {
  return sheet.generations[node.generation].tokens.slice(node.from, node.to);
}

export function pathOf(sheet, id = sheet.current) {
  const path = [];
  for (let node = sheet.nodes[id]; node; node = sheet.nodes[node.parent]) path.unshift(node);
  return path;
}

export const pathText = (sheet, id) => pathOf(sheet, id).map((node) => textOf(sheet, node)).join("");

export function addNode(sheet, parent, fields) {
  const node = { id: makeId(), parent: parent.id, children: [], ...fields };
  sheet.nodes[node.id] = node;
  parent.children.push(node.id);
  return node;
}

// Token ids of the text up to a node; null where some of it was never tokenized, or not by this model.
export function idsTo(sheet, id, model) {
  const node = sheet.nodes[id];
  const generation = sheet.generations[node.generation];
  if (!generation || generation.fingerprint !== model.fingerprint) return null;
  // The text was cut before a stop text, the tokens were not.
  if (node.to === generation.tokens.length && generation.finish === "stop" && generation.request?.stop) return null;
  return [...generation.prompt_ids, ...generation.tokens.slice(0, node.to).map((token) => token.id)];
}

// The node at which a sheet has exactly this text, dividing one where it must; null where no branch has it.
export function nodeAt(sheet, text) {
  const open = [[sheet.root, 0]];
  for (const [id, begin] of open) {
    const node = sheet.nodes[id];
    const own = textOf(sheet, node);
    const end = begin + own.length;
    if (text.length < end) {
      if (!text.endsWith(own.slice(0, text.length - begin))) continue;
      const [at, partial] = node.generation ? tokenAt(sheet, node, text.length - begin) : [text.length - begin, ""];
      if (!partial) return split(sheet, node, at);
    } else if (text.startsWith(own, begin)) {
      if (end === text.length) return node;
      open.push(...node.children.map((child) => [child, end]));
    }
  }
  return null;
}

// Divide a node before a token (of a generation) or a character; the upper part keeps the id.
export function split(sheet, node, at) {
  const lower = { ...node, id: makeId(), parent: node.id };
  delete lower.name;
  if (node.generation) {
    lower.from = at;
    node.to = at;
  } else {
    lower.text = node.text.slice(at);
    node.text = node.text.slice(0, at);
  }
  for (const child of lower.children) sheet.nodes[child].parent = lower.id;
  node.children = [lower.id];
  sheet.nodes[lower.id] = lower;
  if (sheet.current === node.id) sheet.current = lower.id;
  return node;
}

function appendRuns(sheet, base, runs) {
  let last = base;
  for (const { by, text } of runs) {
    if (!text) continue;
    const extends_ = last.id !== sheet.root && !last.generation && last.by === by && !last.children.length;
    if (extends_) last.text += text;
    else last = addNode(sheet, last, { by, text });
  }
  return last;
}

function removeNode(sheet, node) {
  const parent = sheet.nodes[node.parent];
  parent.children = parent.children.filter((child) => child !== node.id);
  for (const child of [...node.children]) removeNode(sheet, sheet.nodes[child]);
  delete sheet.nodes[node.id];
}

// Replace text from start to end of the current path. Where that would change what the model said, or what another
// branch begins with, a branch begins instead and the old text stays in the tree.
export function edit(sheet, start, end, inserted) {
  let offset = 0;
  const places = pathOf(sheet).map((node) => {
    const text = textOf(sheet, node);
    const place = { node, text, start: offset, end: offset + text.length };
    offset = place.end;
    return place;
  });
  let first = places.findIndex((place) => start < place.end);
  if (first < 0) first = places.length - 1;
  const before = places[first - 1];
  const joins = inserted && first > 1 && start === places[first].start && before.node.by === "you";
  if (joins) first -= 1;
  const place = places[first];
  const within = start - place.start;
  const rest = places.slice(first).map(({ node, text, start: from }) => (
    { by: node.by, text: text.slice(Math.max(0, end - from)) }
  ));
  const runs = [{ by: "you", text: inserted }, ...rest];
  const inPlace = places.slice(first).every(({ node, end: until }, number) => {
    const next = places[first + number + 1]?.node.id;
    if (node.children.some((child) => child !== next)) return false;
    return !node.generation || (number === 0 && start >= until);
  });
  let base = place.node;
  if (inPlace) {
    if (places[first + 1]) removeNode(sheet, places[first + 1].node);
    if (!base.generation && base.id !== sheet.root) {
      const { name } = base;
      base.text = base.text.slice(0, within);
      if (!base.text) {
        const parent = sheet.nodes[base.parent];
        removeNode(sheet, base);
        base = parent;
        const known = new Set(parent.children);
        sheet.current = appendRuns(sheet, base, runs).id;
        const added = parent.children.find((child) => !known.has(child));
        if (added && name) sheet.nodes[added].name = name;
        return tidy(sheet);
      }
    }
  } else if (within === 0 && place.node.id !== sheet.root) {
    base = sheet.nodes[place.node.parent];
  } else if (start < place.end) {
    const [at, partial] = place.node.generation ? tokenAt(sheet, place.node, within) : [within, ""];
    runs.unshift({ by: "model", text: partial });
    base = at === place.node.from ? sheet.nodes[place.node.parent] : split(sheet, place.node, at);
  }
  if (!inPlace && runs.some((run) => run.text)) {
    const [head, ...others] = runs.filter((run) => run.text);
    base = addNode(sheet, base, head);
    sheet.current = appendRuns(sheet, base, others).id;
  } else sheet.current = appendRuns(sheet, base, runs).id;
  return tidy(sheet);
}

// The token that holds a character of a node, and the text of that token before it.
function tokenAt(sheet, node, within) {
  let passed = 0;
  const tokens = tokensOf(sheet, node);
  for (let number = 0; number < tokens.length; number += 1) {
    const { text } = tokens[number];
    if (passed + text.length > within) return [node.from + number, text.slice(0, within - passed)];
    passed += text.length;
  }
  return [node.to, ""];
}

// Join pieces that no longer need to be apart.
export function tidy(sheet) {
  for (const id of Object.keys(sheet.nodes)) {
    let node = sheet.nodes[id];
    while (node && node.id !== sheet.root && node.children.length === 1 && sheet.current !== node.id) {
      const child = sheet.nodes[node.children[0]];
      const same = node.generation
        ? child.generation === node.generation && child.from === node.to
        : !child.generation && child.by === node.by && sheet.mode === "sheet";
      if (!same || child.name) break;
      if (node.generation) node.to = child.to;
      else node.text += child.text;
      node.children = child.children;
      for (const each of node.children) sheet.nodes[each].parent = node.id;
      delete sheet.nodes[child.id];
      if (sheet.current === child.id) sheet.current = node.id;
    }
  }
}

// Begin a branch with another token in place of one of a node.
export function choose(sheet, node, index, alternative) {
  const generation = sheet.generations[node.generation];
  const token = generation.tokens[index];
  const base = index === node.from ? sheet.nodes[node.parent] : split(sheet, node, index);
  const chosen = {
    id: makeId(), chosen: true, model: generation.model, fingerprint: generation.fingerprint,
    prompt_ids: [...generation.prompt_ids, ...generation.tokens.slice(0, index).map((each) => each.id)],
    tokens: [{ ...token, id: alternative.id, text: alternative.text, logprob: alternative.logprob, chosen: true }],
  };
  sheet.generations[chosen.id] = chosen;
  const added = addNode(sheet, base, { by: "model", generation: chosen.id, from: 0, to: 1 });
  sheet.current = added.id;
  return added;
}

// Go to a node, and on to the end that was left last.
export function goTo(sheet, id) {
  let node = sheet.nodes[id];
  while (node.children.length) node = sheet.nodes[node.latest in sheet.nodes ? node.latest : node.children.at(-1)];
  sheet.current = node.id;
  remember(sheet);
}

export function remember(sheet) {
  for (const node of pathOf(sheet)) if (node.parent) sheet.nodes[node.parent].latest = node.id;
}

// The nearest node of the path that has siblings; the root where there is none.
export function branchOf(sheet, id = sheet.current) {
  const path = pathOf(sheet, id);
  return path.findLast((node) => node.parent && sheet.nodes[node.parent].children.length > 1) ?? path[0];
}

export function deleteBranch(sheet, id) {
  const node = sheet.nodes[id];
  const parent = sheet.nodes[node.parent];
  removeNode(sheet, node);
  if (!(sheet.current in sheet.nodes)) goTo(sheet, parent.id);
  forgetUnused(sheet);
  tidy(sheet);
}

// Drop the generations of which nothing is left.
export function forgetUnused(sheet) {
  const used = new Set(Object.values(sheet.nodes).map((node) => node.generation));
  for (const { generation } of sheet.steps?.replies ?? []) used.add(generation);
  for (const id of Object.keys(sheet.generations)) if (!used.has(id)) delete sheet.generations[id];
}

export function leaves(sheet, id = sheet.root) {
  const node = sheet.nodes[id];
  return node.children.length ? node.children.flatMap((child) => leaves(sheet, child)) : [id];
}
