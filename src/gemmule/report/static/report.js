"use strict";
// Charts that zoom and hover, drawn over the SVG of the page, which stays for paper.
const report = (() => {
  let plots = [];

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = () => document.querySelector('input[name="axis"]:checked')?.value ?? "step";
  const byAxis = (figure) => (figure.classList.contains("by-axis") ? axis() : "step");
  const short = (value) => {
    if (value == null) return "";
    const [size, letter] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => Math.abs(value) >= size) ?? [1, ""];
    return Number((value / size).toPrecision(4)) + letter;
  };

  function style(classes) {
    const kinds = classes.split(" ");
    const base = color("--" + kinds[0]);
    const faint = kinds.includes("raw");
    return {
      stroke: faint ? base + "66" : base,
      width: faint ? 1 : kinds.includes("validation") ? 2 : 1.6,
      dash: kinds[0] === "floor" || kinds.includes("dashed") ? [6, 4] : undefined,
    };
  }

  function table(series, x) {
    const keep = series[x].map((value, index) => index).filter((index) => series[x][index] != null);
    return [keep.map((index) => series[x][index]), keep.map((index) => series.y[index])];
  }

  // The whole curve is shown within its bounds, which leave out the first losses; a part of it as it is.
  function bounds(plot, chart, low, high) {
    const xs = plot.data[0];
    const { min, max } = plot.scales.x;
    const whole = min == null || (min <= xs[0] && max >= xs[xs.length - 1]);
    return whole && chart.bounds ? chart.bounds : uPlot.rangeNum(low ?? 0, high ?? 1, 0.05, false);
  }

  function drawMarks(chart, x) {
    return (plot) => {
      const { ctx, bbox } = plot;
      ctx.save();
      for (const mark of chart.marks) {
        ctx.strokeStyle = ctx.fillStyle = color(mark.kind === "resume" ? "--muted" : "--bad");
        ctx.setLineDash(mark.kind === "resume" ? [2, 4] : []);
        mark[x].forEach((place, index) => {
          const left = plot.valToPos(place, "x", true);
          if (place == null || left < bbox.left || left > bbox.left + bbox.width) return;
          ctx.beginPath();
          if (mark.y[index] == null) {
            ctx.moveTo(left, bbox.top);
            ctx.lineTo(left, bbox.top + bbox.height);
            ctx.stroke();
          } else {
            const top = Math.max(plot.valToPos(mark.y[index], "y", true), bbox.top + 10);
            ctx.moveTo(left, top);
            ctx.lineTo(left - 5, top - 9);
            ctx.lineTo(left + 5, top - 9);
            ctx.fill();
          }
        });
      }
      ctx.restore();
    };
  }

  function draw(chart, figure) {
    const x = byAxis(figure);
    const series = chart.series.filter((each) => each[x].some((value) => value != null));
    if (!series.length) return;
    const data = uPlot.join(series.map((each) => table(each, x)));
    const tick = { stroke: color("--muted"), grid: { stroke: color("--line"), width: 0.5 }, ticks: { show: false } };
    const label = x === "time" ? figure.querySelector(".by-time text:nth-last-of-type(2)")?.textContent ?? "time" : x;
    const place = document.createElement("div");
    place.className = "interactive";
    place.tabIndex = 0;
    place.setAttribute("role", "application");
    place.setAttribute("aria-label", figure.querySelector("h3").textContent + ": arrow keys move, plus and minus zoom, 0 shows all");
    figure.insertBefore(place, figure.querySelector("figcaption"));
    const plot = new uPlot(
      {
        width: Math.max(240, figure.clientWidth),
        height: figure.clientWidth < 500 ? 240 : 300,
        scales: {
          x: { time: false },
          y: { distr: chart.log ? 3 : 1, range: chart.log ? undefined : (plot, low, high) => bounds(plot, chart, low, high) },
        },
        axes: [
          { ...tick, label, labelSize: 22, size: 34, values: (_, ticks) => ticks.map(short) },
          { ...tick, label: chart.unit, labelSize: 20, size: 52, values: (_, ticks) => ticks.map(short) },
        ],
        cursor: { points: { size: 6 } },
        legend: { markers: { width: 2 } },
        series: [
          { label, value: (_, value) => short(value) },
          ...series.map((each) => ({
            label: each.name,
            spanGaps: true,
            points: { show: false },
            value: (_, value) => (value == null ? "" : String(Number(value.toPrecision(5)))),
            ...style(each.classes),
          })),
        ],
        hooks: { draw: [drawMarks(chart, x)] },
      },
      data,
      place,
    );
    keys(place, plot);
    figure.classList.add("drawn");
    plots.push({ plot, figure, place });
  }

  function keys(place, plot) {
    place.addEventListener("keydown", (event) => {
      const xs = plot.data[0];
      const { min, max } = plot.scales.x;
      const at = plot.cursor.idx ?? Math.floor(xs.length / 2);
      const actions = {
        ArrowLeft: () => move(Math.max(0, at - 1)),
        ArrowRight: () => move(Math.min(xs.length - 1, at + 1)),
        "+": () => zoom(0.5),
        "-": () => zoom(2),
        0: () => plot.setScale("x", { min: xs[0], max: xs[xs.length - 1] }),
      };
      const move = (index) => plot.setCursor({ left: plot.valToPos(xs[index], "x"), top: 10 });
      const zoom = (factor) => {
        const half = ((max - min) / 2) * factor;
        plot.setScale("x", { min: Math.max(xs[0], xs[at] - half), max: Math.min(xs[xs.length - 1], xs[at] + half) });
      };
      const action = actions[event.key];
      if (action && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        action();
      }
    });
  }

  function drawAll() {
    plots.forEach(({ plot, figure, place }) => (plot.destroy(), place.remove(), figure.classList.remove("drawn")));
    plots = [];
    const { charts } = JSON.parse(document.getElementById("curves-data").textContent);
    for (const chart of charts) {
      const figure = document.getElementById(chart.id);
      if (figure) draw(chart, figure);
    }
    document.querySelectorAll(".scripted").forEach((each) => (each.hidden = !plots.length));
  }

  let waiting;
  const later = () => (clearTimeout(waiting), (waiting = setTimeout(drawAll, 100)));
  document.addEventListener("change", (event) => event.target.name === "axis" && drawAll());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => innerWidth !== width && ((width = innerWidth), later()));
  drawAll();
  return { drawAll, shown: () => plots };
})();
