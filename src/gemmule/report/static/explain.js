"use strict";
// Marks in the text what a head looked at; everything else of the page works without scripts.
const HEADS = JSON.parse(document.getElementById("heads").textContent);
const LIMITS = [10, 30, 70, 150, 300, 500, 800];

function look(panel) {
  const model = Number(panel.dataset.model), layers = HEADS[model];
  const select = panel.querySelector("select"), text = panel.querySelector(".reading"), told = panel.querySelector("output");
  const tokens = document.getElementById(`text-m${model}`);
  const figures = [...document.querySelectorAll(".head")].filter((f) => f.dataset.model === String(model));
  let query = 0;

  for (const token of tokens.children) {
    const copy = document.createElement("span");
    copy.className = "t" + (token.classList.contains("nl") ? " nl" : "") + (token.classList.contains("start") ? " start" : "");
    copy.textContent = token.textContent;
    copy.tabIndex = 0;
    text.append(copy);
  }
  const spans = [...text.children];
  layers.forEach((heads, layer) => heads.forEach((_, head) => {
    select.append(new Option(`layer ${layer}, head ${head}`, `${layer} ${head}`));
  }));

  function draw() {
    const [layer, head] = select.value.split(" ").map(Number), row = layers[layer][head][query];
    for (const span of spans) {
      span.classList.remove("w1", "w2", "w3", "w4", "w5", "w6", "w7", "query");
      span.removeAttribute("title");
    }
    const named = [];
    for (let i = 0; i < row.length; i += 2) {
      const span = spans[row[i]], weight = row[i + 1];
      span.classList.add("w" + LIMITS.filter((limit) => weight >= limit).length);
      span.title = (weight / 10).toFixed(1) + "%";
      if (i < 6) named.push(`${span.textContent.trim() || "\u21b5"} ${span.title}`);
    }
    spans[query].classList.add("query");
    told.textContent = `${spans[query].textContent.trim()} looks at: ${named.join(", ")}`;
    for (const figure of figures) {
      const chosen = figure.dataset.layer === String(layer) && figure.dataset.head === String(head);
      figure.classList.toggle("chosen", chosen);
      figure.setAttribute("aria-pressed", String(chosen));
    }
  }
  function choose(place) { query = place; draw(); }
  function on(element, act) {
    element.addEventListener("click", act);
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); }
    });
  }
  spans.forEach((span, place) => on(span, () => choose(place)));
  for (const figure of figures) {
    figure.tabIndex = 0;
    figure.setAttribute("role", "button");
    on(figure, () => { select.value = `${figure.dataset.layer} ${figure.dataset.head}`; draw(); });
  }
  select.addEventListener("change", draw);
  panel.hidden = false;
  choose(Math.min(spans.length - 1, Math.floor(spans.length / 2)));
}

document.querySelectorAll(".look").forEach(look);
