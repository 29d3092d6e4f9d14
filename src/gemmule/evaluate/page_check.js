"use strict";
/* Run the runtime of a page in node: node page_check.js JOB. JOB names runtime, wasm, packed file, prompt and strings.

   Printed is JSON: the ids of each string, the greedy continuation of the prompt as ids and as text, node's version. */

const fs = require("fs");
const vm = require("vm");

const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
vm.runInThisContext(fs.readFileSync(job.runtime, "utf8"));

async function check(job, fs) {
  const file = fs.readFileSync(job.packed), model = await Model.make(fs.readFileSync(job.wasm), file.length);
  model.write(0, file);
  model.open();
  const { vocabulary } = model, ids = [];
  let text = "";
  const settings = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, seed: 0, max_tokens: job.tokens, stop: [] };
  const emit = (id, added) => {
    if (id !== null) ids.push(id);
    text += added;
  };
  await generate(model, vocabulary.prompt(job.prompt), settings, emit, () => false);
  const encoded = job.strings.map((string) => vocabulary.prompt(string));
  console.log(JSON.stringify({ encoded, ids, text, version: process.versions.node }));
}

// Classes of a classic script are no properties of the global object, but other scripts see them.
vm.runInThisContext(`(${check})`)(job, fs);
