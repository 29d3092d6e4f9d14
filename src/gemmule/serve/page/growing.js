// A reply that grows into the tree while it comes.

import { addNode } from "./tree.js";

const DRAW_SHARE = 3;

// What `stream` is to call whenever tokens came. The generation becomes a node below `parent`; `draw` gets the node,
// `grown` the tokens per second so far.
export function growing(sheet, parent, generation, { draw, grown }) {
  let node = null;
  let began = 0;
  let timer = 0;
  let pause = 0;
  const drawNew = () => {
    timer = 0;
    if (generation.finish) return; // all of it is shown then
    const before = performance.now();
    draw(node);
    // A long text is laid out slowly: what draws takes a quarter of the time at most.
    pause = DRAW_SHARE * (performance.now() - before);
  };
  return () => {
    const count = generation.tokens.length;
    if (!count) return;
    began ||= performance.now();
    if (!node) {
      sheet.generations[generation.id] = generation;
      node = addNode(sheet, parent, { by: "model", generation: generation.id, from: 0, to: 0 });
      sheet.current = node.id;
    }
    node.to = count;
    timer ||= setTimeout(drawNew, pause);
    grown((count - 1) / ((performance.now() - began) / 1000) || 0);
  };
}
