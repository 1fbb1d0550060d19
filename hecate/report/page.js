"use strict";
// Draws the views of a report with plotly: runs -> one run -> one of its layers -> one step. Data are decoded on demand.

const meta = JSON.parse(document.getElementById("meta").textContent);
const colors = ["#1f4e79", "#c8553d", "#2a9d8f", "#8e5ea2", "#b8860b", "#5f6b76"];
const verbColors = {
  gather: "#8e5ea2", reduce: "#8c564b", average: "#e377c2", count: "#ff9f1c", plan: "#c8553d", reshard: "#5f6b76",
  dispatch: "#1f77b4", combine: "#17becf", experts: "#2a9d8f", step: "#d5dae0",
};
const before = "#c8553d", after = "#2a9d8f";
const dark = ["#000004", "#1d1147", "#51127c", "#822681", "#b63679", "#e65164", "#fb8861", "#fec287", "#fcfdbf"];
const scale = (list) => list.map((color, i) => [i / (list.length - 1), color]);
const blue = scale(["#f6f7f9", "#c6dbef", "#6baed6", "#2171b5", "#08306b"]);
const config = { displayModeBar: false, responsive: true };
const state = { run: 0, when: 1, layer: 0, step: null, range: null };
const $ = (id) => document.getElementById(id);
const decoded = new Map();

// Data.

async function bytes(run, name) {
  const id = `r${run}-${name}`;
  if (!decoded.has(id)) {
    const packed = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    decoded.set(id, new Response(stream).arrayBuffer());
    if (decoded.size > 64) decoded.delete(decoded.keys().next().value);
  }
  return decoded.get(id);
}

const object = async (run, name) => JSON.parse(new TextDecoder().decode(await bytes(run, name)));

async function curves(run) {
  const values = new Float32Array(await bytes(run, "curves")), points = meta.runs[run].points;
  const row = (index) => Array.from(values.subarray(index * points, (index + 1) * points), (v) => (isNaN(v) ? null : v));
  return (name, which = 1) => (name === "step" ? row(0) : row(1 + 3 * meta.metrics.indexOf(name) + which));
}

// The map's columns with their first steps; from the exact data if `range` has few enough of them.
async function imbalances(run, when, range) {
  const about = meta.runs[run], steps = about.runSteps, layers = about.layers.length;
  const value = (code) => 1 + code * (about.top - 1) / 65535;
  const rows = (data, columns, from, to) => Array.from({ length: layers }, (_, layer) => {
    const start = (when * layers + layer) * columns;
    return Array.from(data.subarray(start + from, start + to), value);
  });
  const from = range ? Math.max(0, steps.findLastIndex((s) => s <= range[0])) : 0;
  const to = range ? steps.findLastIndex((s) => s <= range[1]) + 1 : steps.length;
  if (to - from > about.overviewSteps.length || to <= from) {
    const data = new Uint16Array(await bytes(run, "overview")), columns = about.overviewSteps.length;
    return { steps: about.overviewSteps, values: rows(data, columns, 0, columns), last: about.last };
  }
  const found = { steps: steps.slice(from, to), values: Array.from({ length: layers }, () => []),
    last: to < steps.length ? steps[to] - 1 : about.last };
  for (let chunk = Math.floor(from / about.chunk); chunk * about.chunk < to; chunk++) {
    const first = chunk * about.chunk, columns = Math.min(about.chunk, steps.length - first);
    const data = new Uint16Array(await bytes(run, `run${chunk}`));
    rows(data, columns, Math.max(0, from - first), Math.min(columns, to - first))
      .forEach((row, layer) => row.forEach((v) => found.values[layer].push(v)));
  }
  return found;
}

async function layerData(run, layer) {
  const about = meta.runs[run], data = new Uint8Array(await bytes(run, `layer${layer}`));
  const columns = about.layerSteps.length, experts = about.experts[layer];
  let at = 0;
  const loads = (rows) => Array.from({ length: rows }, () => {
    let code = 0;
    return Array.from({ length: columns }, () => {
      code = (code + data[at++]) & 255;
      return 2 ** (code / meta.octave) - 1;
    });
  });
  const found = { loads: loads(experts), before: loads(about.devices), after: loads(about.devices) };
  found.held = Array.from({ length: experts }, () =>
    Array.from({ length: about.devices }, () => data[at++] / 255));
  return found;
}

// Drawing.

function layout(title, x, y, more = {}) {
  return {
    title: { text: title, font: { size: 13 }, x: 0, xref: "paper", xanchor: "left", y: 0.97, yanchor: "top" },
    margin: { l: 56, r: 14, t: more.showlegend === false ? 32 : more.tall ? 70 : 54, b: 40 }, font: { size: 11, family: "system-ui, DejaVu Sans, sans-serif" },
    xaxis: { title: { text: x, standoff: 4 }, ...more.xaxis },
    yaxis: { title: { text: y, standoff: 4 }, automargin: true, ...more.yaxis },
    legend: { orientation: "h", y: 1.0, yanchor: "bottom", x: 0, xanchor: "left", font: { size: 10 } },
    hovermode: more.hovermode ?? "closest", barmode: more.barmode, shapes: more.shapes, showlegend: more.showlegend ?? true,
  };
}

// An axis of things with numbers: each has a tick if they are few.
const numbered = (count, more) => ({ range: [-0.5, count - 0.5], dtick: count <= 12 ? 1 : undefined, tickformat: "d", zeroline: false,
  ...more });
const downward = (count) => numbered(count, { range: [count - 0.5, -0.5] });

const draw = (id, traces, shape) => Plotly.react(id, traces, shape, config);

function heat(x, y, z, more) {
  return { type: "heatmap", x, y, z, colorscale: scale(dark), zmin: 0, zmax: 3, ...more,
    colorbar: { thickness: 10, len: 1, outlinewidth: 0, tickfont: { size: 10 }, ...more?.colorbar } };
}

// The edges of the columns; plotly takes the middles, but for the last all edges are known.
const edges = (steps, last) => [...steps, last + 1].map((s) => s - 0.5);

const CHARTS = [
  { title: "training loss", unit: "nats per token", lines: [["loss", ""]], validation: true, band: true },
  { title: "throughput", unit: "tokens per second", lines: [["tokens_per_second", ""]], band: true, zero: true },
  { title: "imbalance of the devices, mean over layers", unit: "max / mean load", band: true,
    lines: [["imbalance_before", "without copies", "dot"], ["imbalance_after", "with copies"]], own: [before, after] },
  { title: "worst layer, with copies", unit: "max / mean load", lines: [["imbalance_worst", ""]], band: true },
  { title: "copies, planned ahead and after the gate", unit: "copies of all layers", zero: true,
    lines: [["planned", "planned"], ["copies_calibrated", "calibrated", "dot"]] },
  { title: "sent for copies, and moved by re-sharding", unit: "bytes", lines: [["bytes_copied", ""]], zero: true, moved: true },
  { title: "mispredicted loads", unit: "share of tokens", lines: [["mispredicted", ""]], zero: true, band: true },
  { title: "planning in threads, and input data", unit: "seconds per step", zero: true,
    lines: [["planning_seconds", "planning"], ["data_seconds", "data", "dot"]] },
  { title: "peak memory of rank 0", unit: "bytes", zero: true, lines: [["memory_bytes", "in use"],
    ["memory_owned", "owned", "dash"], ["memory_optimizer", "optimizer", "dot"], ["memory_copies", "copies", "dashdot"]],
    one: true },
];

async function drawCurves() {
  const all = await Promise.all(meta.runs.map((_, run) => curves(run)));
  for (const [index, chart] of CHARTS.entries()) {
    const traces = [], shapes = [], several = all.length > 1;
    all.forEach((curve, run) => {
      const late = curve("copies_calibrated");
      const of = (name, which) => (name !== "planned" ? curve(name, which)
        : curve("copies").map((c, i) => (c === null ? null : c - late[i])));
      const x = curve("step"), color = colors[run % colors.length];
      for (const [line, [name, label, dash]] of (several && chart.one ? chart.lines.slice(0, 1) : chart.lines).entries()) {
        const own = several || chart.lines.length === 1 ? color : (chart.own ?? colors)[line];
        if (chart.band && !(line && chart.lines.length > 1)) {
          const band = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
          traces.push({ ...band, y: of(name, 0) }, { ...band, y: of(name, 2), fill: "tonexty", fillcolor: own + "22" });
        }
        const title = [several ? meta.runs[run].name : "", label].filter(Boolean).join(", ");
        traces.push({ x, y: of(name), name: title, mode: "lines", line: { color: own, width: 1.6, dash },
          showlegend: title !== "" });
      }
      const about = meta.runs[run];
      if (chart.validation && about.validation.length)
        traces.push({ x: about.validation.map((v) => v[0]), y: about.validation.map((v) => v[1]), mode: "markers",
          marker: { color: several ? color : after, size: 6 }, name: "validation", showlegend: !several });
      if (chart.moved && about.moved.length)
        traces.push({ x: about.moved.map((m) => m[0]), y: about.moved.map((m) => m[2]), mode: "markers",
          name: "re-sharding", text: about.moved.map((m) => `${m[1]} experts`),
          marker: { color, symbol: "triangle-down", size: 8 } });
      if (chart.moved && !several && about.moved.length <= 200)
        about.moved.forEach((m) => shapes.push({ type: "line", x0: m[0], x1: m[0], y0: 0, y1: 1, yref: "paper",
          line: { color: "#d5dae0", width: 1 }, layer: "below" }));
    });
    const named = traces.filter((trace) => trace.showlegend !== false).length;
    await draw(box(`chart${index}`), traces, layout(chart.title, "step", chart.unit, { shapes, showlegend: named > 0, tall: named > 3,
      yaxis: chart.zero ? { rangemode: "tozero" } : {} }));
  }
  await drawKinds(all);
}

function box(id, parent = "curves") {
  if (!$(id)) $(parent).insertAdjacentHTML("beforeend", `<div class="plot" id="${id}"></div>`);
  return id;
}

// Seconds of a step by kind, stacked; one chart per run.
async function drawKinds(all) {
  for (const [run, curve] of all.entries()) {
    const x = curve("step");
    const traces = [...meta.verbs, "reshard"].map((verb) => ({ x, y: curve(`exposed_${verb}`), name: verb, mode: "lines",
      line: { width: 0.5, color: verbColors[verb] }, stackgroup: "kinds" }));
    const name = all.length > 1 ? ` of ${meta.runs[run].name}` : "";
    await draw(box(`kinds${run}`), traces, layout(`exposed seconds${name}, largest of the ranks`, "step", "seconds per step", { tall: true }));
  }
}

async function drawRun() {
  const about = meta.runs[state.run], range = state.range;
  const map = await imbalances(state.run, state.when, range);
  const top = Math.max(...map.values.map((row) => row.reduce((a, b) => Math.max(a, b), 1)), 1.05);
  const each = Math.ceil((map.last + 1 - map.steps[0]) / map.steps.length);
  $("run-hint").textContent = `Imbalance (max / mean load of the devices), ${each > 1 ? `the largest of ${each} steps` : "step by step"}. ` +
    "Drag to see fewer steps, click to open a layer.";
  const trace = heat(edges(map.steps, map.last), about.layers.map((_, i) => i), map.values, { zmin: 1, zmax: Math.min(top, 4),
    hovertemplate: "step %{x}<br>layer %{y}<br>imbalance %{z:.3f}<extra></extra>" });
  await draw("map", [trace], layout("imbalance by layer", "step", "layer", {
    xaxis: { range: range ?? [about.first - 0.5, about.last + 0.5] }, yaxis: { ...downward(about.layers.length), fixedrange: true },
    showlegend: false }));
  const names = ["without copies", "with copies"];
  const bars = about.histogram.map((counts, when) => ({ type: "bar", x: about.bins, y: counts, name: names[when], offset: 0,
    width: about.bins[1] - about.bins[0], marker: { color: [before, after][when], opacity: 0.65 } }));
  const used = about.bins.filter((_, i) => about.histogram[0][i] || about.histogram[1][i]);
  await draw("histogram", bars, layout("distribution, whole run", "imbalance (3: and more)", "layers x steps", { barmode: "overlay",
    xaxis: { range: [0.98, Math.max(1.1, used.at(-1) + 0.05)] } }));
}

async function drawLayer() {
  const about = meta.runs[state.run], data = await layerData(state.run, state.layer);
  const x = edges(about.layerSteps, about.last), ids = (n) => Array.from({ length: n }, (_, i) => i);
  const hover = (what) => ({ hovertemplate: `step %{x}<br>${what} %{y}<br>%{z:.2f} of the mean<extra></extra>` });
  const axes = (rows) => ({ yaxis: downward(rows), showlegend: false }), experts = about.experts[state.layer];
  await draw("loads", [heat(x, ids(experts), data.loads, hover("expert"))],
    layout(`expert load / mean, ${about.layers[state.layer]}`, "step", "expert", axes(experts)));
  const copies = Math.max(...data.held.map((row) => Math.max(...row)));
  await draw("held", [heat(ids(about.devices), ids(experts), data.held, { colorscale: blue,
    zmin: 0, zmax: copies || 1, hovertemplate: "expert %{y} on device %{x}<br>in %{z:.0%} of the steps<extra></extra>" })],
    layout(copies ? "where copies were, share of steps" : "no copies in this layer", "device", "expert",
      { ...axes(experts), xaxis: numbered(about.devices) }));
  for (const [id, color] of [["before", "without"], ["after", "with"]])
    await draw(id, [heat(x, ids(about.devices), data[id], { zmin: 0, zmax: 2, ...hover("device") })],
      layout(`device load / mean, ${color} copies`, "step", "device", axes(about.devices)));
}

async function drawStep() {
  const about = meta.runs[state.run], data = await object(state.run, `step${state.step}`), layer = state.layer;
  const every = about.steps.length < about.count;
  $("step-hint").textContent = `of layer ${about.layers[layer]}` + (every
    ? `; ${about.steps.length} of ${about.count} steps are kept in full, those with the largest imbalance of their time.` : ".");
  const bar = (y, name, color) => ({ type: "bar", y, name, marker: { color } });
  await draw("expert-bars", [bar(data.loads[layer], "", colors[0])], layout(
    `expert loads; ${percent(data.mispredicted[layer])} at other experts than predicted`, "expert", "tokens",
    { showlegend: false, xaxis: numbered(about.experts[layer]) }));
  await draw("device-bars", [bar(data.before[layer], "without copies", before), bar(data.after[layer], "with copies", after)],
    layout(`device loads, imbalance ${data.imbalance[0][layer].toFixed(3)} -> ${data.imbalance[1][layer].toFixed(3)}`,
      "device", "tokens", { barmode: "group", xaxis: numbered(about.devices) }));
  const dots = (late, name, color, symbol) => {
    const own = data.copied[layer].filter((c) => c[2] === late);
    return { x: own.map((c) => c[0]), y: own.map((c) => c[1]), name: `${name} (${own.length})`, mode: "markers",
      marker: { color, symbol, size: 8 }, hovertemplate: "expert %{x} to device %{y}<extra></extra>" };
  };
  await draw("copied", [dots(0, "planned", colors[0], "circle"), dots(1, "calibrated", before, "diamond")],
    layout(data.copied[layer].length ? "copies" : "no copies in this step", "expert", "device", {
      xaxis: numbered(about.experts[layer]), yaxis: downward(about.devices) }));
  const kinds = meta.verbs.map((verb, i) => ({ type: "bar", x: about.layers.map((_, l) => l), y: data.seconds.map((s) => s[i]),
    name: verb, marker: { color: verbColors[verb] } }));
  await draw("seconds", kinds, layout("seconds by kind, rank 0", "layer", "seconds", { barmode: "stack",
    xaxis: numbered(about.layers.length) }));
  await drawTimeline();
}

const percent = (share) => (share === null ? "unknown share" : `${(100 * share).toFixed(0)} %`);

// Labels of the profiled steps as bars, a row per label.
async function drawTimeline() {
  const has = meta.runs[state.run].spans;
  $("timeline-box").hidden = !has;
  $("no-timeline").hidden = has;
  if (!has) return;
  const spans = await object(state.run, "spans");
  const steps = spans.filter((s) => s.verb === "step");
  fill("pick-span", steps.map((s, i) => [i, `rank ${s.rank}, step ${s.of}`]), $("pick-span").value || 0);
  const shown = steps[$("pick-span").value] ?? { begin: 0, seconds: Infinity, trace: 0 };
  const own = spans.filter((s) => s.verb !== "step" && s.trace === shown.trace && s.begin >= shown.begin &&
    s.begin < shown.begin + shown.seconds);
  const verbs = [...new Set(own.map((s) => s.verb))];
  const traces = verbs.map((verb) => {
    const part = own.filter((s) => s.verb === verb);
    return { type: "bar", orientation: "h", name: verb, y: part.map(() => verb), x: part.map((s) => 1000 * s.seconds),
      base: part.map((s) => 1000 * (s.begin - shown.begin)), marker: { color: verbColors[verb] }, showlegend: false,
      text: part.map((s) => s.of), textposition: "none", hovertemplate: `${verb} %{text}<br>%{x:.3f} ms<extra></extra>` };
  });
  await draw("timeline", traces, layout(`step of ${(1000 * shown.seconds).toFixed(1)} ms`, "milliseconds", "", { barmode: "overlay" }));
}

// Choosing what is shown.

function fill(id, options, value) {
  $(id).replaceChildren(...options.map(([key, text]) => new Option(text, key, false, String(key) === String(value))));
}

const nearest = (steps, step) => steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));

async function show(changes, scroll) {
  if ("run" in changes) Object.assign(state, { layer: 0, range: null, step: null });
  Object.assign(state, changes);
  const about = meta.runs[state.run];
  state.step = nearest(about.steps, state.step ?? about.last);
  fill("pick-run", meta.runs.map((run, i) => [i, run.name]), state.run);
  fill("pick-layer", about.layers.map((name, i) => [i, `${i}: ${name}`]), state.layer);
  fill("pick-step", about.steps.map((step) => [step, step]), state.step);
  history.replaceState(null, "", `#run=${state.run}&layer=${state.layer}&step=${state.step}`);
  if (["run", "when", "range"].some((key) => key in changes)) await drawRun();
  if (["run", "layer"].some((key) => key in changes)) await drawLayer();
  if (["run", "layer", "step"].some((key) => key in changes)) await drawStep();
  if (scroll) $(scroll).scrollIntoView({ behavior: "instant", block: "start" });
}

function facts() {
  const keys = [...new Set(meta.runs.flatMap((run) => Object.keys(run.facts)))];
  const row = (name, cells) => {
    const tr = $("facts").insertRow();
    tr.appendChild(document.createElement("th")).textContent = name;
    return cells.map((cell) => Object.assign(tr.insertCell(), { textContent: cell }));
  };
  row("run", meta.runs.map((run) => run.name)).forEach((cell, i) => cell.insertAdjacentHTML("afterbegin",
    `<span class="chip" style="background:${colors[i % colors.length]}"></span>`));
  row("recorded", meta.runs.map((run) => `steps ${run.first} to ${run.last}` + (run.finished ? "" : ", not finished")));
  keys.forEach((key) => row(key, meta.runs.map((run) => run.facts[key] ?? "")));
}

function listen() {
  const on = (id, key, then) => $(id).addEventListener("change", (e) => show({ [key]: Number(e.target.value) }, then));
  on("pick-run", "run"); on("pick-when", "when"); on("pick-layer", "layer"); on("pick-step", "step");
  $("pick-span").addEventListener("change", drawTimeline);
  $("whole").addEventListener("click", () => show({ range: null }));
  $("map").on("plotly_click", (e) => show({ layer: e.points[0].y, step: Math.round(e.points[0].x) }, "layer"));
  $("map").on("plotly_relayout", (e) => {
    if ("xaxis.range[0]" in e) show({ range: [e["xaxis.range[0]"], e["xaxis.range[1]"]] });
    else if (e["xaxis.autorange"]) show({ range: null });
  });
  for (const id of ["loads", "before", "after"])
    $(id).on("plotly_click", (e) => show({ step: Math.round(e.points[0].x) }, "step"));
}

async function start() {
  facts();
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const number = (key, most) => Math.min(Math.max(0, Number(asked[key]) || 0), most);
  const run = number("run", meta.runs.length - 1);
  await show({ run, layer: number("layer", meta.runs[run].layers.length - 1), ...(asked.step ? { step: Number(asked.step) } : {}) });
  await drawCurves();
  listen();
  document.body.dataset.ready = "1";
}

start();
