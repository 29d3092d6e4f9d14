// Sheets in the browser's IndexedDB, and in files.

export const FORMAT = "gemmule-sheets";
export const VERSION = 1;

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// Open from the first use on, so that a page that is being left still writes.
let database = null;

export async function loadSheets() {
  const opening = indexedDB.open("gemmule", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("sheets", { keyPath: "id" });
  database = await finished(opening);
  return finished(table("readonly").getAll());
}

const table = (mode) => database.transaction("sheets", mode).objectStore("sheets");

export async function saveSheet(sheet) {
  const sheets = table("readwrite");
  const writing = finished(sheets.put(sheet));
  sheets.transaction.commit();
  return writing;
}

export const deleteSheet = async (id) => finished(table("readwrite").delete(id));

export function exported(sheets) {
  return JSON.stringify({ format: FORMAT, version: VERSION, exported: new Date().toISOString(), sheets }, null, 1);
}

// The sheets of a file; an Error says what is wrong with one that is not ours.
export function imported(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON; choose one that this page exported or `gemmule chat` saved.");
  }
  if (content?.format !== FORMAT || !Array.isArray(content.sheets)) {
    throw new Error(`The file is not of the format ${FORMAT}; choose one that this page exported or \`gemmule chat\` saved.`);
  }
  if (content.version !== VERSION) {
    throw new Error(`The file has version ${content.version}; this page reads version ${VERSION}.`);
  }
  for (const sheet of content.sheets) {
    check(sheet);
    // JavaScript has no exact number beyond, and a seed that is not exact repeats nothing.
    for (const each of Object.values(sheet.generations)) if (!Number.isSafeInteger(each.seed)) each.seed = null;
  }
  return content.sheets;
}

function check(sheet) {
  const { nodes, generations, root, current, steps } = sheet ?? {};
  const whole = nodes && generations && nodes[root] && nodes[current] && nodes[root].parent === null
    && ["sheet", "chat"].includes(sheet.mode) && typeof sheet.title === "string" && typeof sheet.settings === "object"
    && Object.values(generations).every((each) => Array.isArray(each.tokens) && Array.isArray(each.prompt_ids)
      && each.tokens.every(({ id, text, top }) => Number.isInteger(id) && typeof text === "string" && Array.isArray(top)))
    && Object.entries(nodes).every(([id, node]) => node.id === id && Array.isArray(node.children)
      && node.children.every((child) => nodes[child]?.parent === id)
      && (id === root || nodes[node.parent]?.children.includes(id))
      && (node.generation ? generations[node.generation] : typeof node.text === "string"))
    && below(nodes, root) === Object.keys(nodes).length
    && (!steps || (steps.request && steps.place && steps.replies?.every(({ generation }) => generation in generations)));
  if (!whole) throw new Error(`Sheet ${JSON.stringify(sheet?.title ?? "")} of the file is damaged; nothing was imported.`);
}

// How many nodes hang below one, itself included; where none is shared, none is its own ancestor.
function below(nodes, root) {
  const open = [root];
  for (let number = 0; number < open.length; number += 1) open.push(...nodes[open[number]].children);
  return open.length;
}
