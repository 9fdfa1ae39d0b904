"""The page's HTML, style, and the part of its script that makes headings and tables.

`page` puts the script of the lanes where it says `@LANES@`, and the data where it says `@DATA@`.
The script makes all text by `textContent`, so that no name in a program is read as HTML; the
policy in the head lets the page load nothing.
"""

TEMPLATE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'">
<title>Timelines</title>
<style>
:root {
  color-scheme: light dark;
  --back: #ffffff; --text: #1b1b1b; --quiet: #595959; --line: #d0d0d0; --lane: #f3f3f3;
  --key: #f3f3f3; --exposed: #d40000;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #16181b; --text: #ececec; --quiet: #a8adb3; --line: #41464d; --lane: #666d75;
    --key: #2a2e33; --exposed: #ff5a52;
  }
}
body { margin: 1.5rem auto; padding: 0 1.25rem; max-width: 90rem;
       background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .25rem 0; max-width: 75em; }
.quiet { color: var(--quiet); font-size: .9em; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; padding: 0; margin: .6rem 0;
          list-style: none; }
.legend i { display: inline-block; width: 1.6em; height: .8em; margin-right: .45em;
            border: 1px solid var(--line); }
button { font: inherit; color: inherit; background: var(--key); border: 1px solid var(--line);
         border-radius: 4px; padding: .15rem .6rem; cursor: pointer; }
canvas { display: block; width: 100%; margin: .4rem 0 .8rem; cursor: grab; touch-action: pan-y; }
:focus-visible { outline: 2px solid #2a7de1; outline-offset: 2px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92em; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #2a7de1; }
th button::after { content: " \2195"; color: var(--quiet); font-weight: 400; }
th[aria-sort=ascending] button::after { content: " \25b2"; }
th[aria-sort=descending] button::after { content: " \25bc"; }
#tip { position: fixed; z-index: 1; max-width: 34rem; padding: .4rem .6rem; border-radius: 4px;
       pointer-events: none; background: var(--back); border: 1px solid var(--quiet);
       font-size: .88em; white-space: pre-line; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Timelines</h1>
<p class="quiet">Wheel: zoom. Drag: pan. On a focused timeline: + and - zoom, the arrows pan,
0 shows all. All timelines share one axis.</p>
<p class="quiet">Of each loop one iteration is drawn, under a bracket that says how often it runs;
the numbers in words and in the tables are of the whole step.</p>
<ul class="legend" id="legend" aria-label="Colours"></ul>
<p><button type="button" id="all">Show all</button></p>
<main id="programs"></main>
<div id="tip" role="status" hidden></div>
<noscript><p>This page draws with JavaScript, which is turned off.</p></noscript>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
@LANES@
// ---------------------------------------------------------------- tables

const COLUMNS = [  // heading, value to sort by, text, whether it is a number
  ["collective", one => one.name],
  ["kind", one => one.kind],
  ["link", one => one.link],
  ["scope", one => one.scope],
  ["count", one => one.count, one => String(one.count)],
  ["MiB sent", one => one.sent, one => number(one.sent / 2 ** 20)],
  ["ms", one => one.seconds, one => number(one.seconds * 1e3)],
  ["exposed ms", one => one.exposed, one => number(one.exposed * 1e3)],
  ["hidden by", one => hiders(one, one.hidden_by.length)],
];

function hiders(one, most) {
  const said = one.hidden_by.slice(0, most).map(([who, seconds]) => `${who} ${duration(seconds)}`);
  const more = one.hidden_by.length - said.length;
  return said.join(", ") + (more > 0 ? ` and ${more} more` : "");
}

function table(program) {
  const made = element("table"), head = element("tr"), body = element("tbody");
  made.append(element("caption", {}, "Collectives"));
  COLUMNS.forEach(([heading, value, text], index) => {
    const cell = element("th", {scope: "col", class: text ? "number" : ""});
    const button = element("button", {type: "button"}, heading);
    button.addEventListener("click", () => sort(program, made, index));
    cell.append(button);
    head.append(cell);
  });
  const top = element("thead");
  top.append(head);
  made.append(top, body);
  fill(body, program.collectives);
  return made;
}

function fill(body, collectives) {
  body.replaceChildren(...collectives.map(one => {
    const row = element("tr");
    for (const [heading, value, text] of COLUMNS) {
      const isHiders = heading === "hidden by";
      const said = isHiders ? hiders(one, 3) : text ? text(one) : value(one);
      const cell = element("td", {class: text ? "number" : ""}, said);
      if (isHiders && one.hidden_by.length > 3) cell.title = value(one);
      row.append(cell);
    }
    return row;
  }));
}

function sort(program, made, index) {
  const [, value, text] = COLUMNS[index], cells = made.querySelectorAll("th");
  const first = text ? "descending" : "ascending", second = text ? "ascending" : "descending";
  const order = cells[index].getAttribute("aria-sort") === first ? second : first;
  cells.forEach(cell => cell.removeAttribute("aria-sort"));
  cells[index].setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0);
  fill(made.tBodies[0], [...program.collectives].sort((a, b) => sign * compare(a, b)));
}

// ---------------------------------------------------------------- the page

function legend() {
  const list = document.getElementById("legend");
  for (const {entry, colour, hatched} of data.legend) {
    const item = element("li"), swatch = element("i");
    if (!hatched) swatch.style.background = colour;
    else if (entry === EXPOSED) swatch.style.background = `repeating-linear-gradient(` +
      `135deg, var(--exposed) 0 1.5px, var(--back) 1.5px 5px)`;
    else swatch.style.background =
      "radial-gradient(var(--quiet) 1.2px, var(--back) 1.5px) 0 0 / 4px 4px";
    item.append(swatch, entry);
    list.append(item);
  }
}

function section(program) {
  const made = element("section"), label = `${program.title}: ${summary(program.report)}`;
  const canvas = element("canvas", {tabindex: "0", role: "img", "aria-label": label});
  const wide = element("div", {class: "wide"}), chart = {canvas, program, drag: null};
  made.append(element("h2", {}, program.title), element("p", {}, summary(program.report)), canvas);
  if (program.collectives.length) wide.append(table(program));
  else wide.append(element("p", {class: "quiet"}, "No collectives."));
  made.append(wide);
  charts.push(chart);
  listen(chart);
  return made;
}

document.title = "Timelines: " + data.programs.map(program => program.title).join(", ");
legend();
document.getElementById("programs").append(...data.programs.map(section));
document.getElementById("all").addEventListener("click", () => show(0, whole));
window.addEventListener("resize", requestDraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", requestDraw);
draw();
document.documentElement.dataset.ready = "true";
</script>
</body>
</html>
"""
