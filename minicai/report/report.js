"use strict";
// The transcript browser. What models wrote is set as text, never as markup. A row's body is made when it is opened.
const KINDS = JSON.parse(document.getElementById("rows").textContent), SHOWN = 50;
const get = id => document.getElementById(id), list = get("list"), state = {kind: "", q: "", principle: "", outcome: "", shown: SHOWN};
let found = [];

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
const words = () => state.q.toLowerCase().split(/\s+/).filter(Boolean);
function text(tag, name, said) {  // with the words that are searched for marked
  const element = make(tag, name), wanted = words(), lower = said.toLowerCase();
  let at = 0;
  while (wanted.length && lower.length === said.length) {
    const hits = wanted.map(word => [lower.indexOf(word, at), word.length]).filter(([place]) => place >= 0).sort((a, b) => a[0] - b[0] || b[1] - a[1]);
    if (!hits.length) break;
    const [place, length] = hits[0];
    element.append(said.slice(at, place), make("mark", "", said.slice(place, place + length)));
    at = place + length;
  }
  element.append(said.slice(at));
  return element;
}
const BAD = /^(harmful$|refused|mistaken|broken|worsened|against|not kept|decided by|cut off)|: (harmful|refused|mistaken)|to the end$/, GOOD = /^(good|mended)|: good$/;
const tag = said => make("span", "tag" + (BAD.test(said) ? " bad" : GOOD.test(said) ? " good" : ""), said);
const label = (said, outcome) => make("div", "label", make("b", "", said), outcome ? tag(outcome) : null);
const said = (words, name = "") => words ? text("p", "said " + name, words) : make("p", "said same", "(nothing)");
const revised = (now, before) => now === before ? make("p", "said same", "unchanged") : said(now);
const fixed = value => value === null ? "–" : value.toFixed(3);

const BODIES = {
  answers: row => [make("div", "columns", ...row.answers.map(([stage, answer, outcome]) => make("div", "", label(stage, outcome), said(answer))))],
  revisions: row => [
    label("initial response", row.initial[1]), said(row.initial[0]),
    ...row.rounds.flatMap(([principle, critique, revision, outcome], k) => [
      label(`round ${k + 1}: ${principle}`), critique === null ? null : said(critique, "critique"),
      label(k + 1 < row.rounds.length || row.stopped ? "revision" : "final revision", outcome), revised(revision, k ? row.rounds[k - 1][2] : row.initial[0])]),
    ...(row.stopped ? [label(`${row.stopped[0]}: a critique that finds nothing`), said(row.stopped[1], "critique")] : [])],
  comparisons: row => {
    const side = (name, answer, best) => make("div", best ? "best" : "", label(name + (best ? ", preferred" : ""), row.better === name ? "judge: better" : ""), said(answer));
    const bar = make("div", "bar", make("i"));
    bar.firstChild.style.width = 100 * row.p + "%";
    const votes = row.votes.map(([principle, order, first, second, , judge]) => make("tr", "", ...[
      principle, order.replace(",", ", "), fixed(first), fixed(second), fixed(1 / (1 + Math.exp(second - first))), judge].map(cell => text("td", "", String(cell)))));
    const head = make("tr", "", ...["principle", "shown as", "log-prob first", "log-prob second", "P(first)", "feedback model"].map(cell => make("th", "", cell)));
    return [make("div", "columns", side("first", row.first, row.p > 0.5), side("second", row.second, row.p < 0.5)), bar,
      make("div", "label", `label: P(first is better) = ${row.p.toPrecision(3)}, ${row.source}`),
      votes.length ? make("div", "wide", make("table", "", head, ...votes)) : null,
      ...row.votes.filter(vote => vote[4]).flatMap(vote => [label(`${vote[0]}, shown as ${vote[1]}: rationale`), said(vote[4], "critique")])];
  },
  episodes: row => [label(`iteration ${row.step}, score ${fixed(row.score)}`), said(row.response)]};

const lastTurn = row => row.prompt[row.prompt.length - 1][1];
function strings(value) { return typeof value === "string" ? value : value && typeof value === "object" ? Object.values(value).map(strings).join("\n") : ""; }
const haystack = row => row.haystack ??= strings(row).toLowerCase();

function fill(details) {
  if (details.childElementCount > 1) return;
  const row = details.row, earlier = row.prompt.slice(0, -1).flatMap(([role, turn]) => [label(role), said(turn)]);
  details.append(make("div", "body", ...earlier, ...BODIES[state.kind](row)));
}
function entry(row) {
  const tags = state.kind === "episodes" ? [tag(`iteration ${row.step}`), tag(`score ${fixed(row.score)}`)] : [];
  const details = make("details", "row", make("summary", "", text("span", "title", lastTurn(row)), make("span", "tags", ...tags, ...row.tags.map(tag))));
  details.row = row;
  details.addEventListener("toggle", () => details.open && fill(details));
  return details;
}
function options(select, all, names) {
  const counts = new Map();
  for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
  const made = [["", all], ...[...counts].sort().map(([name, count]) => [name, `${name} (${count})`])];
  select.replaceChildren(...made.map(([value, shown]) => Object.assign(make("option", "", shown), {value})));
  select.disabled = !counts.size;
}
function chooseKind(kind) {
  Object.assign(state, {kind, principle: "", outcome: ""});
  for (const button of get("kinds").children) button.setAttribute("aria-pressed", button.value === kind);
  options(get("principle"), "every principle", KINDS[kind].rows.flatMap(row => row.principles));
  options(get("outcome"), "every outcome", KINDS[kind].rows.flatMap(row => row.tags));
}
function show() {
  const {rows, count, file} = KINDS[state.kind], wanted = words();
  found = rows.filter(row => (!state.principle || row.principles.includes(state.principle)) && (!state.outcome || row.tags.includes(state.outcome))
    && wanted.every(word => haystack(row).includes(word)));
  list.replaceChildren(...found.slice(0, state.shown).map(entry));
  get("more").hidden = found.length <= state.shown;
  get("count").textContent = `${found.length} of ${rows.length}` + (count > rows.length ? `; all ${count} in ${file}` : "");
  const hash = new URLSearchParams(Object.entries(state).filter(([key, value]) => key !== "shown" && value));
  try { history.replaceState(null, "", "#" + hash); } catch { /* not where the page is inside another document */ }
}
function change(key, value) {
  Object.assign(state, {[key]: value, shown: SHOWN});
  show();
}
function move(by) {
  const rows = [...list.children], at = rows.findIndex(row => row.contains(document.activeElement));
  const next = rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + by))];
  if (!next) return;
  next.firstChild.focus({preventScroll: true});
  next.scrollIntoView({block: "nearest"});
}

if (Object.keys(KINDS).length) {
  get("browser").hidden = false;
  get("kinds").append(...Object.entries(KINDS).map(([kind, {count}]) => {
    const button = Object.assign(make("button", "", kind + " ", make("small", "", String(count))), {type: "button", value: kind});
    button.addEventListener("click", () => { chooseKind(kind); change("kind", kind); });
    return button;
  }));
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  chooseKind(Object.hasOwn(KINDS, asked.kind ?? "") ? asked.kind : Object.keys(KINDS)[0]);
  state.q = get("search").value = asked.q ?? "";
  for (const id of ["principle", "outcome"]) {
    get(id).value = asked[id] ?? "";
    state[id] = get(id).value;
    get(id).addEventListener("change", event => change(id, event.target.value));
  }
  get("search").addEventListener("input", event => change("q", event.target.value));
  get("more").addEventListener("click", () => {
    list.append(...found.slice(state.shown, state.shown += SHOWN).map(entry));
    get("more").hidden = found.length <= state.shown;
  });
  const target = location.hash.slice(1);
  show();
  if (target && !("kind" in asked)) get(target)?.scrollIntoView();
  document.addEventListener("keydown", event => {
    const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") {
      if (event.target === get("search")) { get("search").value = ""; change("q", ""); event.target.blur(); }
      else for (const open of list.querySelectorAll("details[open]")) open.open = false;
    } else if (writing) {
      if (event.key === "Enter" && event.target === get("search")) move(0);
    } else if (event.key === "/") { event.preventDefault(); get("search").focus(); get("search").select(); }
    else if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
  });
  addEventListener("beforeprint", () => list.querySelectorAll("details").forEach((row, k) => { if (k < 20 && !row.open) { fill(row); row.open = row.printed = true; } }));
  addEventListener("afterprint", () => list.querySelectorAll("details").forEach(row => { if (row.printed) row.open = row.printed = false; }));
}

get("theme").hidden = false;
get("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.style.colorScheme ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
});

const live = Number(document.body.dataset.live);  // seconds; not while something is read, marked or typed
if (live) setInterval(() => {
  if (!document.querySelector("details[open]") && !getSelection().toString() && document.activeElement === document.body) location.reload();
}, 1000 * live);
