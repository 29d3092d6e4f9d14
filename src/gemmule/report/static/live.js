"use strict";
// Takes over the newest state of the page from its server, which answers 304 while nothing has changed.
(() => {
  const status = document.createElement("div");
  status.className = "live screen";
  status.setAttribute("role", "status");
  document.body.append(status);
  let tag = document.documentElement.dataset.tag;

  function take(text) {
    const page = new DOMParser().parseFromString(text, "text/html");
    const chosen = document.querySelector('input[name="axis"]:checked')?.value;
    const focused = document.activeElement?.closest("figure")?.id;
    const { scrollX, scrollY } = window;
    document.title = page.title;
    document.getElementById("main").replaceChildren(...page.getElementById("main").childNodes);
    document.getElementById("curves-data").textContent = page.getElementById("curves-data").textContent;
    const radio = chosen && document.querySelector(`input[name="axis"][value="${chosen}"]`);
    if (radio) radio.checked = true;
    report.drawAll();
    if (focused) document.getElementById(focused)?.querySelector(".interactive")?.focus({ preventScroll: true });
    scrollTo(scrollX, scrollY);
  }

  async function ask() {
    if (!document.hidden) {
      try {
        const answer = await fetch("/", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          tag = answer.headers.get("ETag");
          take(await answer.text());
        }
        status.textContent = "live";
      } catch {
        status.textContent = "the server does not answer; the page stays as it was";
      }
    }
    setTimeout(ask, 2000);
  }
  setTimeout(ask, 2000);
})();
