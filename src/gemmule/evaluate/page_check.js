"use strict";
/* Run the runtime of a page in node: node page_check.js JOB. JOB names runtime, wasm and packed file, and what is asked:
   `strings` to be encoded, or `prompt`, ids to be continued by so many `tokens`. Prints the answer as JSON. */

const fs = require("fs");
const vm = require("vm");

const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
vm.runInThisContext(fs.readFileSync(job.runtime, "utf8"));

async function check(job, fs) {
  const file = fs.readFileSync(job.packed), model = await Model.make(fs.readFileSync(job.wasm), file.length), ids = [];
  model.write(0, file);
  model.open();
  const settings = { temperature: 0, top_k: 0, top_p: 1, min_p: 0, seed: 0, max_tokens: job.tokens, stop: [] };
  if (job.prompt) await generate(model, job.prompt, settings, (id) => id !== null && ids.push(id), () => false);
  const encoded = (job.strings ?? []).map((string) => model.vocabulary.prompt(string));
  console.log(JSON.stringify({ encoded, ids }));
}

// Classes of a classic script are no properties of the global object, but other scripts see them.
vm.runInThisContext(`(${check})`)(job, fs);
