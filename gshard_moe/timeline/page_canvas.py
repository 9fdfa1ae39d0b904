"""The part of the page's script that draws lanes on canvases, and zooms, pans and tells of bars."""

LANES = r"""const data = JSON.parse(document.getElementById("data").textContent);
const MARGIN_TOP = 24, ROW = 32, BAR = 24, AXIS = 26, GAP = 12;  // pixels
const whole = Math.max(...data.programs.map(program => program.seconds)) || 1;
const view = {begin: 0, end: whole};  // seconds
const entries = new Map(data.legend.map(one => [one.entry, one]));
const EXPOSED = "exposed communication";
const charts = [];
const tip = document.getElementById("tip");

// ---------------------------------------------------------------- words

function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

function unitOf(seconds) {
  return seconds >= 1 ? [1, "s"] : seconds >= 1e-3 || !seconds ? [1e3, "ms"] : [1e6, "\u00b5s"];
}

function duration(seconds) {
  const [scale, unit] = unitOf(seconds);
  return (seconds * scale).toFixed(3) + " " + unit;
}

function bytes(count) {
  if (count < 1024) return count.toFixed(0) + " B";
  if (count < 2 ** 20) return (count / 1024).toFixed(1) + " KiB";
  return (count / 2 ** 20).toFixed(3) + " MiB";
}

function number(value) { return value > 0 && value < 0.001 ? "<0.001" : value.toFixed(3); }

function percent(share) { return (100 * share).toFixed(1) + "%"; }

function summary(report) {
  const said = report.comm_s
    ? `${duration(report.exposed_s)} of ${duration(report.comm_s)} of communication exposed, ` +
      `${percent(report.hidden_share)} hidden`
    : "no communication";
  const guessed = report.guessed_share
    ? ` ${percent(report.guessed_share)} of the step is of kernels whose time is a guess.` : "";
  return `Step ${duration(report.step_s)}: ${said}. With nothing overlapped it would take ` +
    `${duration(report.serial_s)}; at best ${duration(report.lower_bound_s)}` +
    (report.bound_by ? ` (bound by ${report.bound_by}).` : ".") + guessed;
}

function described(bar) {
  const lines = [(bar.what === "stall" ? "wait for " : "") + bar.name];
  if (bar.kind) lines.push("kind: " + bar.kind);
  lines.push("scope: " + (bar.scope || "unknown"));
  lines.push("duration: " + duration(bar.end - bar.begin) + (bar.guessed ? " (a guess)" : ""));
  if (bar.sent) lines.push("sent by a device: " + bytes(bar.sent));
  lines.push("times: " + bar.times);
  if (bar.what === "stall") lines.push(bar.entry);
  return lines.join("\n");
}

// ---------------------------------------------------------------- lanes

function style(name) { return getComputedStyle(document.documentElement).getPropertyValue(name); }

function hatch(context, entry) {
  const exposed = entry === EXPOSED;
  const tile = element("canvas", {width: 8, height: 8}), pen = tile.getContext("2d");
  pen.fillStyle = style("--back");
  pen.fillRect(0, 0, 8, 8);
  pen.strokeStyle = pen.fillStyle = exposed ? style("--exposed") : style("--quiet");
  pen.lineWidth = 1.6;
  pen.beginPath();
  if (exposed) for (const at of [-8, 0, 8]) { pen.moveTo(at, 8); pen.lineTo(at + 8, 0); }
  pen.stroke();
  if (!exposed) for (const at of [1, 5]) pen.fillRect(at, at, 1.8, 1.8);
  return context.createPattern(tile, "repeat");
}

function draw() {
  let bars = 0;
  for (const chart of charts) bars += drawChart(chart);
  document.documentElement.dataset.bars = String(bars);
}

function drawChart(chart) {
  const {canvas, program} = chart, ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, bottom = MARGIN_TOP + ROW * program.lanes.length;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round((bottom + AXIS) * ratio);
  canvas.style.height = bottom + AXIS + "px";
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "13px system-ui, sans-serif";
  chart.left = margin(context);
  chart.scale = Math.max(1, width - chart.left - GAP) / (view.end - view.begin);
  const fills = new Map(data.legend.map(
    one => [one.entry, one.hatched ? hatch(context, one.entry) : one.colour]));
  context.textBaseline = "middle";
  program.lanes.forEach((lane, row) => {
    const top = MARGIN_TOP + ROW * row;
    context.fillStyle = style("--text");
    context.textAlign = "right";
    context.fillText(lane.name, chart.left - GAP, top + ROW / 2);
    context.fillStyle = style("--lane");
    context.fillRect(chart.left, top + (ROW - BAR) / 2, width - chart.left - GAP, BAR);
  });
  drawAxis(context, chart, width, bottom);
  context.save();
  context.beginPath();
  context.rect(chart.left, 0, width - chart.left - GAP, bottom);
  context.clip();
  let drawn = 0;
  program.lanes.forEach((lane, row) => {
    const top = MARGIN_TOP + ROW * row + (ROW - BAR) / 2;
    for (const bar of lane.bars) drawn += drawBar(context, chart, bar, top, fills.get(bar.entry));
  });
  for (const loop of program.loops) drawLoop(context, chart, loop);
  context.restore();
  return drawn;
}

function margin(context) {
  const names = data.programs.flatMap(program => program.lanes.map(lane => lane.name));
  return Math.min(220, 2 * GAP + Math.max(...names.map(name => context.measureText(name).width)));
}

function place(chart, seconds) { return chart.left + (seconds - view.begin) * chart.scale; }

function drawBar(context, chart, bar, top, fill) {
  if (bar.end <= view.begin || bar.begin >= view.end) return 0;
  const from = Math.max(place(chart, bar.begin), chart.left - 2);
  const width = Math.max(Math.min(place(chart, bar.end), 1e5) - from, 0.75);
  context.fillStyle = fill;
  context.fillRect(from, top, width, BAR);
  const {hatched, colour} = entries.get(bar.entry);
  if (width > 3) {  // an outline, so that neighbours part and dark bars show on a dark page
    context.strokeStyle = hatched ? fill : style("--back");
    context.lineWidth = 1;
    context.strokeRect(from + 0.5, top + 0.5, width - 1, BAR - 1);
  }
  const text = bar.what === "flight" ? bar.kind || bar.name : bar.entry;
  const fits = context.measureText(text).width + 8 < width;
  if (fits && !hatched && text !== "other") {
    context.fillStyle = bright(colour) ? "#000000" : "#ffffff";
    context.textAlign = "center";
    context.fillText(text, from + width / 2, top + BAR / 2);
  }
  return 1;
}

function bright(colour) {
  const [red, green, blue] = [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 115;
}

function drawLoop(context, chart, loop) {
  const from = place(chart, loop.begin), to = place(chart, loop.end), y = MARGIN_TOP - 5;
  context.strokeStyle = context.fillStyle = style("--text");
  context.lineWidth = 1;
  context.beginPath();
  for (const [x, at] of [[from, y + 5], [from, y], [to, y], [to, y + 5]]) context.lineTo(x, at);
  context.stroke();
  const text = "\u00d7 " + loop.times;
  if (context.measureText(text).width < to - from) {
    context.textAlign = "center";
    const shown = Math.max(from, chart.left) + Math.min(to, place(chart, view.end));
    context.fillText(text, shown / 2, y - 8);
  }
}

function drawAxis(context, chart, width, bottom) {
  const [scale, unit] = unitOf(view.end), rough = (view.end - view.begin) * scale / (width / 110);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const digits = Math.min(9, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  context.strokeStyle = style("--line");
  context.fillStyle = style("--quiet");
  context.textAlign = "center";
  context.lineWidth = 1;
  for (let n = Math.ceil(view.begin * scale / step); n * step <= view.end * scale; n++) {
    const x = place(chart, n * step / scale);
    context.beginPath();
    context.moveTo(x, MARGIN_TOP);
    context.lineTo(x, bottom + 4);
    context.stroke();
    if (x < width - 60) context.fillText((n * step).toFixed(digits), x, bottom + 14);
  }
  context.textAlign = "right";
  context.fillText(unit, width - GAP, bottom + 14);
}

// ---------------------------------------------------------------- zoom, pan, hover

function show(begin, length) {
  const kept = Math.min(Math.max(length, whole * 1e-6), whole);
  view.begin = Math.min(Math.max(begin, 0), whole - kept);
  view.end = view.begin + kept;
  tip.hidden = true;
  requestDraw();
}

let requested = false;
function requestDraw() {
  if (requested) return;
  requested = true;
  requestAnimationFrame(() => { requested = false; draw(); });
}

function zoom(at, factor) {
  show(at - (at - view.begin) * factor, (view.end - view.begin) * factor);
}

function hit(chart, event) {
  const box = chart.canvas.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top - MARGIN_TOP;
  const at = view.begin + (x - chart.left) / chart.scale, near = 2 / chart.scale;
  const lane = chart.program.lanes[Math.floor(y / ROW)];
  if (!lane || x < chart.left) return {at, bar: null};
  const under = lane.bars.filter(bar => bar.begin <= at && at < bar.end);
  const beside = lane.bars.filter(bar => bar.begin - near <= at && at < bar.end + near);
  return {at, bar: under[0] || beside[0] || null};
}

function listen(chart) {
  const {canvas} = chart;
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const length = view.end - view.begin;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      show(view.begin + event.deltaX / chart.scale, length);
    } else {
      zoom(hit(chart, event).at, Math.exp(Math.max(-1, Math.min(1, event.deltaY / 300))));
    }
  }, {passive: false});
  canvas.addEventListener("pointerdown", event => {
    chart.drag = {x: event.clientX, begin: view.begin};
    tip.hidden = true;
  });
  canvas.addEventListener("pointermove", event => { if (!chart.drag) hover(chart, event); });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  window.addEventListener("pointermove", event => {
    if (!chart.drag) return;
    const moved = (event.clientX - chart.drag.x) / chart.scale;
    show(chart.drag.begin - moved, view.end - view.begin);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    window.addEventListener(name, () => { chart.drag = null; });
  }
  canvas.addEventListener("keydown", event => {
    const length = view.end - view.begin, middle = view.begin + length / 2;
    if (event.key === "+" || event.key === "=") zoom(middle, 0.7);
    else if (event.key === "-") zoom(middle, 1 / 0.7);
    else if (event.key === "0") show(0, whole);
    else if (event.key === "ArrowLeft") show(view.begin - length / 8, length);
    else if (event.key === "ArrowRight") show(view.begin + length / 8, length);
    else return;
    event.preventDefault();
  });
}

function hover(chart, event) {
  const {bar} = hit(chart, event);
  tip.hidden = !bar;
  if (!bar) return;
  tip.textContent = described(bar);
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  const below = event.clientY + 16, above = event.clientY - box.height - 10;
  tip.style.top = (below + box.height < innerHeight ? below : above) + "px";
}
"""
