// Everything from the study is shown with textContent: a completion is text, whatever it holds.

const page = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with properties, `data-*` values under `data`, attributes under `attributes`. */
function element(name, { data = {}, attributes = {}, ...properties } = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  Object.assign(made.dataset, data);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------------------ theme

const darkQuery = matchMedia("(prefers-color-scheme: dark)");

function storage(action) {
  try {
    return action(localStorage);
  } catch {
    return null; // some browsers keep nothing for a file
  }
}

let printing = false; // on paper everything shows, in the light theme

function theme() {
  if (printing) return "light";
  const chosen = $("theme").value;
  return chosen === "auto" ? (darkQuery.matches ? "dark" : "light") : chosen;
}

function applyTheme() {
  document.documentElement.dataset.theme = theme();
  for (const box of document.querySelectorAll(".chart-box.drawn")) {
    if (box.checkVisibility()) drawChart(box);
    else drawWhenNear(box); // has no width now
  }
}

$("theme").value = storage((kept) => kept.getItem("gsm8k-report-theme")) ?? "auto";
$("theme").addEventListener("change", () => {
  storage((kept) => kept.setItem("gsm8k-report-theme", $("theme").value));
  applyTheme();
});
darkQuery.addEventListener("change", applyTheme);

// ----------------------------------------------------------------------------------------- charts

/** Draw a chart in its place; Vega's expressions are interpreted, so the page needs no eval. */
async function drawChart(box) {
  const chart = page.charts[box.dataset.chart];
  box.classList.add("drawn");
  box.style.minHeight = `${box.offsetHeight}px`; // nothing below moves while the theme changes
  const target = element("div"); // has to be in the page to have a width
  box.replaceChildren(...legend(chart, box), target);
  const result = await vegaEmbed(target, structuredClone(chart.spec), {
    actions: false,
    ast: true,
    config: page.themes[theme()],
    defaultStyle: false,
    renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  });
  if (!target.isConnected) {
    result.finalize(); // the theme has changed since
    return;
  }
  box.style.minHeight = "";
  box.vega = result.view;
  if (chart.picks) showPicked(chart, box);
}

/** Which methods a chart's legend has brought forward; with none of them all are. */
const picked = new Map(Object.values(page.charts).map((chart) => [chart, new Set()]));

function showPicked(chart, box) {
  const names = [...picked.get(chart)];
  for (const button of box.querySelectorAll(".chart-legend button")) {
    button.setAttribute("aria-pressed", String(names.includes(button.textContent)));
  }
  box.vega?.signal("picked", names).runAsync();
}

/** A chart's legend, where it has one: wraps where its place is narrow, and can be tabbed to. */
function legend(chart, box) {
  if (!chart.legend.length) return [];
  const entries = chart.legend.map((entry) => {
    const content = [swatch(entry), element("span", { textContent: entry.method })];
    if (!chart.picks) return element("li", {}, content);
    const button = element("button", { type: "button" }, content);
    button.addEventListener("click", () => {
      const names = picked.get(chart);
      if (!names.delete(entry.method)) names.add(entry.method);
      showPicked(chart, box);
    });
    return element("li", {}, [button]);
  });
  return [element("ul", { className: "chart-legend" }, entries)];
}

const SYMBOLS = {
  circle: "M-5,0A5,5,0,1,0,5,0A5,5,0,1,0,-5,0Z",
  square: "M-5,-5H5V5H-5Z",
  "triangle-up": "M-5.5,5H5.5L0,-5Z",
  diamond: "M0,-6.5L5,0L0,6.5L-5,0Z",
  cross: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
  "triangle-down": "M-5.5,-5H5.5L0,5Z",
  "triangle-right": "M-5,-5.5V5.5L5,0Z",
};

/** A method's line or symbol, in its colour. */
function swatch({ colour, dash, shape }) {
  const make = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const ink = page.themes[theme()].range.category[colour];
  const width = dash ? 28 : 14;
  const mark = dash
    ? make("path", { d: "M-14,0H14", stroke: ink, "stroke-width": 2.2, "stroke-dasharray": dash })
    : make("path", { d: SYMBOLS[shape], fill: ink });
  const svg = make("svg", { width, height: 14, viewBox: `${-width / 2} -7 ${width} 14` });
  svg.setAttribute("aria-hidden", "true");
  svg.append(mark);
  return svg;
}

const whenNear = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      whenNear.unobserve(entry.target);
      drawChart(entry.target);
    }
  },
  { rootMargin: "400px" },
);
function drawWhenNear(box) {
  box.classList.remove("drawn");
  whenNear.observe(box);
}

for (const box of document.querySelectorAll(".chart-box")) {
  // About its height, so that what a link leads to stays where it is while charts are drawn.
  box.style.minHeight = `${page.charts[box.dataset.chart].spec.height + 60}px`;
  drawWhenNear(box);
}

/** Draw every chart that can be seen, near or not. */
function drawAll() {
  for (const box of document.querySelectorAll(".chart-box")) {
    if (!box.checkVisibility()) continue;
    whenNear.unobserve(box);
    drawChart(box);
  }
}

/** The numbers behind a chart, as a table, made when somebody asks for it. */
function fillNumbers(details) {
  if (!details.open || details.querySelector("table")) return;
  const rows = page.charts[details.dataset.numbers].spec.data.values;
  const keys = Object.keys(rows[0]);
  const shown = (value) =>
    typeof value === "number" && !Number.isInteger(value)
      ? String(Number(value.toPrecision(4)))
      : String(value ?? "");
  const head = element("tr", {}, keys.map((key) =>
    element("th", { textContent: key.replaceAll("_", " "), attributes: { scope: "col" } })));
  const body = rows.map((row) =>
    element("tr", {}, keys.map((key) => element("td", { textContent: shown(row[key]) }))));
  const table = element("table", {}, [element("thead", {}, [head]), element("tbody", {}, body)]);
  const attributes = { role: "region", "aria-label": "Numbers of the chart" };
  details.append(element("div", { className: "scroll", tabIndex: 0, attributes }, [table]));
}
for (const details of document.querySelectorAll("details[data-numbers]")) {
  details.addEventListener("toggle", () => fillNumbers(details));
}

// ------------------------------------------------------------------------------------------ views

let view = 0; // one model on one suite
let listed = []; // places of the problems that the filters let through, in order
let current = null; // place of the problem that is shown
let shownMethods = new Set();

/** Show a view; `link`: the address follows to its first problem. */
function showView(number, link = false) {
  view = number;
  $("missing").hidden = true;
  $("view").value = String(number);
  hideOtherViews();
  for (const chosen of document.querySelectorAll("[data-show-view]")) {
    if (chosen.dataset.showView === String(view)) chosen.setAttribute("aria-current", "true");
    else chosen.removeAttribute("aria-current");
  }
  startBrowser(link);
}

/** Show a view and go to its heading, to which its link leads. */
function goToView(number) {
  $("missing").hidden = true;
  if (number !== view) showView(number);
  const heading = document.querySelector(`#answer [data-view="${number}"] h2`);
  heading?.scrollIntoView({ behavior: "instant" });
  heading?.focus({ preventScroll: true });
}

function hideOtherViews() {
  for (const part of document.querySelectorAll("[data-view]")) {
    part.hidden = !printing && !part.dataset.view.split(" ").includes(String(view));
  }
}
$("view").addEventListener("change", () => showView(Number($("view").value), true));

// ------------------------------------------------------------------------------------------ print

const opened = []; // details that were closed before

addEventListener("beforeprint", () => {
  printing = true;
  for (const details of document.querySelectorAll(".printed:not([open])")) {
    details.open = true;
    opened.push(details);
  }
  document.documentElement.classList.add("printing"); // as wide as paper, for the charts
  document.documentElement.dataset.theme = theme();
  hideOtherViews();
  drawAll();
});
addEventListener("afterprint", () => {
  printing = false;
  for (const details of opened.splice(0)) details.open = false;
  document.documentElement.classList.remove("printing");
  hideOtherViews();
  applyTheme();
});

// ---------------------------------------------------------------------------------------- browser

const browser = () => page.views[view].browser;
const methods = () => browser().methods;

function options(select, pairs) {
  select.replaceChildren(
    ...pairs.map(([value, textContent]) => element("option", { value, textContent })),
  );
}

function startBrowser(link) {
  linkFirst = link;
  const { problems, runs } = browser();
  listed = []; // places of the view before; a search in completions takes a while
  selectProblem(null);
  shownMethods = new Set(methods().keys());
  const names = methods().map((name, place) => [String(place), name]);
  options($("method-a"), names);
  options($("method-b"), names);
  const [a, b] = page.views[view].compared;
  $("method-a").value = String(a);
  $("method-b").value = String(b);
  const seeds = [...new Set(runs.map(([, seed]) => seed))].sort((x, y) => x - y);
  options($("seed"), [["all", "all seeds"], ...seeds.map((seed) => [seed, `seed ${seed}`])]);
  const decodings = [];
  if (problems.some((problem) => problem.greedy)) decodings.push(["greedy", "greedy"]);
  if (problems.some((problem) => problem.sampled)) decodings.push(["sampled", "samples"]);
  options($("decoding"), decodings);
  $("kept").textContent = page.views[view].kept;
  showToggles();
  showList();
  applyFilters();
}

/** Places of the methods as they stand beside each other: A and B, then the best first. */
function columnOrder() {
  const compared = [Number($("method-a").value), Number($("method-b").value)];
  return [...new Set([...compared, ...page.views[view].ranked])];
}

function showToggles() {
  $("key").replaceChildren(
    ...columnOrder().map((place) => methodToggle(methods()[place], place)),
  );
}

function methodToggle(name, place) {
  const box = element("input", { type: "checkbox", checked: shownMethods.has(place) });
  box.addEventListener("change", () => {
    if (box.checked) shownMethods.add(place);
    else shownMethods.delete(place);
    showCompletions();
  });
  return element("label", { className: "chip" }, [box, ` ${name}`]);
}

/** Places of a method's runs at the chosen seed; a method that was run once stands for all. */
function runsOf(method) {
  const { runs } = browser();
  const own = [...runs.keys()].filter((place) => runs[place][0] === method);
  if ($("seed").value === "all" || own.length === 1) return own;
  return own.filter((place) => String(runs[place][1]) === $("seed").value);
}

/** Share of right completions of a method on a problem, or null where it has no run. */
function shareRight(problem, method) {
  const values = problem[$("decoding").value] ?? [];
  const own = runsOf(method);
  return own.length ? own.reduce((sum, place) => sum + values[place], 0) / own.length : null;
}

const CONDITIONS = {
  all: () => true,
  "a-right": (a) => a >= 0.5,
  "a-wrong": (a) => a < 0.5,
  "a-mixed": (a) => a > 0 && a < 1,
  changed: (a, b) => a >= 0.5 !== b >= 0.5,
  gained: (a, b) => a < 0.5 && b >= 0.5,
  lost: (a, b) => a >= 0.5 && b < 0.5,
  "both-right": (a, b) => a >= 0.5 && b >= 0.5,
  "both-wrong": (a, b) => a < 0.5 && b < 0.5,
};

const ORDERS = {
  suite: null,
  hardest: (shares) => shares.reduce((sum, share) => sum + share, 0),
  easiest: (shares) => -shares.reduce((sum, share) => sum + share, 0),
  spread: (shares) => Math.min(...shares) - Math.max(...shares),
};

const AT_ONCE = 32; // records unpacked beside each other
let searchTurn = 0; // a later search ends an earlier one
let typing = 0; // the timer of the search that a pause in typing starts
let linkFirst = false; // the first problem that the view shows goes into the address

/** List what the filters let through. A view that shows no problem yet then shows the first. */
async function applyFilters() {
  clearTimeout(typing); // this call reads what was typed
  const turn = ++searchTurn;
  const { problems } = browser();
  const condition = CONDITIONS[$("outcome").value];
  const [a, b] = [Number($("method-a").value), Number($("method-b").value)];
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = [...problems.keys()].filter((place) =>
    condition(shareRight(problems[place], a), shareRight(problems[place], b)));
  if (words.length) {
    const fits = (place, record) => {
      const { id, question } = problems[place];
      const completions = record ? record.runs.flat().map((row) => row[2]) : [];
      const lower = [id, question, ...completions].join("\n").toLowerCase();
      return words.every((word) => lower.includes(word));
    };
    const kept = [];
    for (let from = 0; from < found.length; from += AT_ONCE) {
      const places = found.slice(from, from + AT_ONCE);
      let records = [];
      if ($("in-completions").checked) {
        $("count").textContent = `searching: ${from} of ${found.length}`;
        records = await Promise.all(places.map(unpack));
        if (turn !== searchTurn) return;
      }
      kept.push(...places.filter((place, at) => fits(place, records[at])));
    }
    found = kept;
  }
  const order = ORDERS[$("order").value];
  if (order) {
    const key = (place) =>
      order(methods().map((_, m) => shareRight(problems[place], m)).filter((s) => s !== null));
    const keys = new Map(found.map((place) => [place, key(place)]));
    found.sort((x, y) => keys.get(x) - keys.get(y) || x - y);
  }
  listed = found;
  showList();
  if (current === null) selectProblem(listed[0] ?? null, { link: linkFirst });
}

function showList() {
  const { problems } = browser();
  $("count").textContent = `${listed.length} of ${problems.length} problems`;
  $("problems").replaceChildren(...listed.map(problemRow));
  markCurrent();
  showPosition();
}

function problemRow(place) {
  const problem = browser().problems[place];
  const shares = methods().map((_, method) => shareRight(problem, method));
  const cells = columnOrder().map((method) => {
    const share = shares[method];
    const state = share === null ? "absent" : share === 0 ? "none" : share === 1 ? "all" : "some";
    return element("span", { className: "cell", title: `${methods()[method]}: ${percent(share)}`,
      data: { state } });
  });
  const right = shares.map((share, method) => `${methods()[method]} ${percent(share)}`).join(", ");
  const label = `${problem.id}: ${problem.question.slice(0, 120)} Right: ${right}`;
  const button = element(
    "button",
    { type: "button", tabIndex: -1, data: { place }, attributes: { "aria-label": label } },
    [
      element("span", { className: "row-id", textContent: problem.id }),
      element("span", { className: "cells" }, cells),
      element("span", { className: "row-question", textContent: problem.question.slice(0, 160) }),
    ],
  );
  return element("li", {}, [button]);
}

const percent = (share) => (share === null ? "no run" : `${Math.round(100 * share)} %`);

function rowButton(place) {
  return $("problems").querySelector(`button[data-place="${place}"]`);
}

/** One row can be reached with Tab: the problem that is shown, or else the first. */
function markCurrent() {
  for (const button of $("problems").querySelectorAll("button[aria-current], button[tabindex='0']")) {
    button.removeAttribute("aria-current");
    button.tabIndex = -1;
  }
  const button = current === null ? null : rowButton(current);
  button?.setAttribute("aria-current", "true");
  const reachable = button ?? $("problems").querySelector("button");
  if (reachable) reachable.tabIndex = 0;
  if (button) {
    // scrollIntoView would move the whole page as well.
    const list = $("problems");
    const above = button.getBoundingClientRect().top - list.getBoundingClientRect().top;
    const room = list.clientHeight - button.offsetHeight;
    if (above < 0) list.scrollTop += above;
    else if (above > room) list.scrollTop += above - room;
  }
}

const address = (place) => {
  const { model, suite } = page.views[view];
  return `#p/${[model, suite, browser().problems[place].id].map(encodeURIComponent).join("/")}`;
};

function selectProblem(place, { link = true, focus = false } = {}) {
  current = place;
  markCurrent();
  if (place !== null && link) history.replaceState(null, "", address(place));
  if (place !== null && focus) rowButton(place)?.focus({ preventScroll: true });
  showProblem();
}

function move(by, focus = false) {
  if (!listed.length) return;
  $("missing").hidden = true;
  const at = listed.indexOf(current);
  const next = at < 0 ? 0 : Math.min(Math.max(at + by, 0), listed.length - 1);
  selectProblem(listed[next], { focus });
}

function showPosition() {
  const at = listed.indexOf(current);
  $("position").textContent =
    at < 0 ? `not among the ${listed.length} listed` : `${at + 1} of ${listed.length}`;
  $("previous").disabled = at === 0 || !listed.length;
  $("next").disabled = at === listed.length - 1 || !listed.length;
}

/** The record of a problem: reference solution and completions. */
async function unpack(place) {
  const packed = JSON.parse($(`record-${view}-${place}`).textContent);
  const bytes = Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function showProblem() {
  $("detail").hidden = current === null;
  if (current === null) return;
  const problem = browser().problems[current];
  $("problem-id").textContent = problem.id;
  $("permalink").href = address(current);
  showText($("question"), problem.question || "(no text of this problem was given)", null);
  $("gold").textContent = problem.gold;
  showPosition();
  showCompletions();
}

async function showCompletions() {
  if (current === null) return;
  const [shownView, shownPlace] = [view, current];
  const record = await unpack(shownPlace);
  if (view !== shownView || current !== shownPlace) return;
  $("solution-part").hidden = !record.answer;
  showText($("solution"), record.answer, null);
  const wanted = $("decoding").value === "greedy" ? 0 : 1;
  const columns = columnOrder()
    .filter((method) => shownMethods.has(method))
    .map((method) => methodColumn(methods()[method], method, record, wanted));
  $("completions-grid").replaceChildren(...columns);
}

function methodColumn(name, method, record, wanted) {
  const cards = runsOf(method).flatMap((run) =>
    record.runs[run]
      .filter((row) => row[0] === wanted)
      .map((row) => card(row, browser().runs[run][1])));
  const right = cards.filter((made) => made.dataset.right === "1").length;
  const heading = element("h4", {}, [
    element("span", { textContent: name }),
    element("span", { className: "quiet", textContent: ` ${right} of ${cards.length} right` }),
  ]);
  const attributes = { "aria-label": name };
  return element("section", { className: "column", attributes }, [heading, ...cards]);
}

function card([decoding, sample, text, correct, answer, tokens, truncated, grades, place], seed) {
  const verdict = element("span", {
    className: "verdict",
    textContent: correct ? "✓ right" : "✗ wrong",
  });
  const found = element("span", {}, answer === null ? ["no answer found"] : [
    "answer ",
    element("strong", { textContent: answer.length > 40 ? `${answer.slice(0, 40)}…` : answer }),
  ]);
  const facts = [`seed ${seed}`, decoding ? `sample ${sample + 1}` : "greedy", `${tokens} tokens`];
  const others = grades.flatMap((grade, at) =>
    grade === null || grade === correct
      ? [] : [`${browser().gradings[at]}: ${grade ? "right" : "wrong"}`]);
  if (others.length) facts.push(`graded otherwise by ${others.join(", ")}`);
  const shown = element("div", { className: "text" });
  showText(shown, text, place);
  const notes = element("p", { className: "facts", textContent: facts.join(" · ") });
  if (truncated) {
    notes.append(" · ", element("strong", { className: "cut", textContent: "cut off" }));
  }
  if (answer !== null && !place) {
    notes.append(" · the answer is not written in this form in the text");
  }
  const head = element("p", { className: "card-head" }, [verdict, " ", found]);
  const data = { right: correct };
  return element("article", { className: "card", data }, [head, shown, notes]);
}

const LONG = 3000; // characters shown of a longer text before somebody asks for all
const AROUND = 500;

/** Show `text` with the stretch `place` marked; the middle of a long one on request only. */
function showText(target, text, place, whole = false) {
  if (!text.trim()) {
    const textContent = text
      ? `(${text.length.toLocaleString("en")} characters, all of them white space)`
      : "(empty)";
    target.replaceChildren(element("span", { className: "quiet", textContent }));
    return;
  }
  if (whole || text.length <= LONG) {
    target.replaceChildren(...stretch(text, 0, text.length, place));
    return;
  }
  const last = place ? Math.max(place[0] - AROUND, LONG - 2 * AROUND) : text.length - AROUND;
  const end = place ? Math.min(text.length, Math.max(place[1] + AROUND, last)) : text.length;
  const gap = (from, to) => to <= from ? [] : [
    element("span", { className: "gap",
      textContent: `… ${(to - from).toLocaleString("en")} characters …` }),
  ];
  const more = element("button", { type: "button", className: "more",
    textContent: `Show all ${text.length.toLocaleString("en")} characters` });
  more.addEventListener("click", () => showText(target, text, place, true));
  target.replaceChildren(
    ...stretch(text, 0, LONG - 2 * AROUND, place), ...gap(LONG - 2 * AROUND, last),
    ...stretch(text, last, end, place), ...gap(end, text.length), more,
  );
}

/** Nodes for text[from, to), what lies in `place` marked. */
function stretch(text, from, to, place) {
  if (!place || place[1] <= from || place[0] >= to) return visible(text.slice(from, to));
  const [start, end] = [Math.max(from, place[0]), Math.min(to, place[1])];
  return [
    ...visible(text.slice(from, start)),
    element("mark", { title: "the answer was found here" }, visible(text.slice(start, end))),
    ...visible(text.slice(end, to)),
  ];
}

// Controls, what is not drawn, and halves of surrogate pairs: shown by number, and without effect.
// Four line ends or more: counted, for an empty box says less.
const UNSEEN =
  /\n{4,}|[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029\u2800\ud800-\udfff\p{Cf}\p{DI}]/gu;

function visible(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > from) nodes.push(text.slice(from, match.index));
    const number = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    const textContent = match[0][0] === "\n" ? `${match[0].length} line ends` : `U+${number}`;
    nodes.push(element("span", { className: "unseen", textContent }));
    if (match[0][0] === "\n") nodes.push("\n");
    from = match.index + match[0].length;
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

// ---------------------------------------------------------------------------- links, keys, events

/** Follow `#p/model/suite/problem` or `#v/model/suite`, where the fragment is one. */
function followFragment() {
  if (!/^#[pv]\//.test(location.hash)) return;
  let parts;
  try {
    parts = location.hash.slice(3).split("/").map(decodeURIComponent);
  } catch {
    return; // a stray %
  }
  const [model, suite, id] = parts;
  const number = page.views.findIndex((item) => item.model === model && item.suite === suite);
  if (location.hash.startsWith("#v/") && number >= 0) {
    goToView(number);
    return;
  }
  const place = number < 0 ? -1
    : page.views[number].browser.problems.findIndex((problem) => problem.id === id);
  if (number >= 0 && number !== view) showView(number);
  if (place < 0) {
    const problem = location.hash.startsWith("#p/") ? `problem “${id ?? ""}” of ` : "";
    $("missing").textContent = `This page holds no ${problem}${model} on ${suite}.`;
    $("missing").hidden = false;
    $("completions").scrollIntoView({ behavior: "instant" });
    return;
  }
  $("missing").hidden = true;
  selectProblem(place, { link: false });
  $("completions").scrollIntoView({ behavior: "instant" });
}
addEventListener("hashchange", followFragment);

$("problems").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  $("missing").hidden = true;
  selectProblem(Number(button.dataset.place));
  if (matchMedia("(max-width: 899px)").matches) $("detail").scrollIntoView();
});
$("problems").addEventListener("keydown", (event) => {
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  move(steps[event.key], true);
});
$("previous").addEventListener("click", () => move(-1));
$("next").addEventListener("click", () => move(1));

$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(applyFilters, 150);
});
$("filters").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["in-completions", "outcome", "method-a", "method-b", "order"]) {
  $(id).addEventListener("change", applyFilters);
}
for (const id of ["seed", "decoding"]) {
  $(id).addEventListener("change", () => {
    applyFilters();
    showCompletions();
  });
}
for (const id of ["method-a", "method-b"]) {
  $(id).addEventListener("change", () => {
    showToggles();
    showCompletions();
  });
}
$("outcome").addEventListener("change", showWhichMethods);

function showWhichMethods() {
  const outcome = $("outcome").value;
  $("part-a").hidden = outcome === "all";
  $("part-b").hidden = outcome === "all" || outcome.startsWith("a-");
}

function cycle(select) {
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  select.dispatchEvent(new Event("change"));
}

$("keys").checked = storage((kept) => kept.getItem("gsm8k-report-keys")) !== "off";
$("keys").addEventListener("change", () => {
  storage((kept) => kept.setItem("gsm8k-report-keys", $("keys").checked ? "on" : "off"));
});

const KEYS = {
  "/": () => {
    $("search").focus();
    $("search").select();
  },
  j: () => move(1),
  k: () => move(-1),
  s: () => cycle($("decoding")),
  t: () => cycle($("theme")),
  "?": () => $("help").showModal(),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const writing = event.target.closest("input:not([type=checkbox]), select, textarea");
  if (event.key === "Escape" && writing) writing.blur();
  if (writing || !(event.key in KEYS) || !$("keys").checked) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("show-help").addEventListener("click", () => $("help").showModal());
for (const link of document.querySelectorAll("[data-show-view]")) {
  link.addEventListener("click", () => goToView(Number(link.dataset.showView)));
}
for (const flag of document.querySelectorAll("a.flag")) {
  flag.addEventListener("click", () => {
    $(flag.hash.slice(1)).closest("details").open = true;
  });
}
// What sticks to the top of the window is as high as its links need.
const header = document.querySelector(".top");
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--top", `${header.offsetHeight}px`);
}).observe(header);

applyTheme();
showWhichMethods();
showView(0);
followFragment();
document.documentElement.dataset.ready = "true";
