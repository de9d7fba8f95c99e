"use strict";
// The transcript browser. What models wrote is set as text, never as markup.
const KINDS = JSON.parse(document.getElementById("rows").textContent), SHOWN = 50;
const get = id => document.getElementById(id), list = get("list");
const state = {kind: "", q: "", principle: "", outcome: "", shown: SHOWN};
let found = [];
const root = document.documentElement;
try { root.style.colorScheme = localStorage.getItem("minicai-theme") ?? ""; }
catch { /* the browser keeps nothing for this page */ }

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
const words = () => state.q.toLowerCase().split(/\s+/).filter(Boolean);
function text(tag, name, said) {  // marks the words that are searched for
  const element = make(tag, name), wanted = words(), lower = said.toLowerCase();
  let at = 0;
  while (wanted.length && lower.length === said.length) {
    const hits = wanted.map(word => [lower.indexOf(word, at), word.length])
      .filter(([place]) => place >= 0).sort((a, b) => a[0] - b[0] || b[1] - a[1]);
    if (!hits.length) break;
    const [place, length] = hits[0];
    element.append(said.slice(at, place), make("mark", "", said.slice(place, place + length)));
    at = place + length;
  }
  element.append(said.slice(at));
  return element;
}
const BAD = /\b(harmful|refused|mistaken|rude)$|^(against|not kept|decided by|cut off)/;
const GOOD = /(^|: |→ )good$/;
function tag(said) {
  const colour = BAD.test(said) ? " bad" : GOOD.test(said) ? " good" : "";
  return make("span", "tag" + colour, said);
}
const label = (said, outcome) =>
  make("div", "label", make("b", "", said), outcome ? tag(outcome) : null);
const said = (words, name = "") =>
  words ? text("p", "said " + name, words) : make("p", "said same", "(nothing)");
// [kind, text] of the words that two texts share, in a longest common subsequence, and of those that
// only one of them has. One or two shared words between two changes count as changed.
function difference(before, now) {
  const a = before.match(/\S+\s*/g) ?? [], b = now.match(/\S+\s*/g) ?? [], runs = [];
  if (a.length * b.length > 4e6) return [["del", before], ["ins", now]];
  const common = [...a, ""].map(() => new Uint16Array(b.length + 1));  // words from i and j on
  const same = (i, j) => a[i].trim() === b[j].trim();
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i][j] = same(i, j) ? common[i + 1][j + 1] + 1
        : Math.max(common[i + 1][j], common[i][j + 1]);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (!same(i, j)) {
      if (common[i + 1][j] >= common[i][j + 1]) i++; else j++;
      continue;
    }
    const from = [i, j];
    while (i < a.length && j < b.length && same(i, j)) { i++; j++; }
    const edge = from[0] + from[1] === 0 || (i === a.length && j === b.length);
    if (edge || i - from[0] > 2) runs.push([...from, i, j]);
  }
  const parts = [];
  let i = 0, j = 0;
  for (const [iFirst, jFirst, iEnd, jEnd] of [...runs, [a.length, b.length]]) {
    parts.push(["del", a.slice(i, iFirst)], ["ins", b.slice(j, jFirst)], ["span",
      b.slice(jFirst, jEnd)]);
    [i, j] = [iEnd, jEnd];
  }
  return parts.map(([kind, words]) => [kind, words.join("")]).filter(([, words]) => words);
}
function revised(now, before) {
  if (now === before) return make("p", "said same", "unchanged");
  return make("p", "said", ...difference(before, now).flatMap(
    ([kind, words]) => [text(kind, "", words.trimEnd()), words.match(/\s*$/)[0] || " "]));
}
const fixed = value => value === null ? "–" : value.toFixed(3);
const cells = (tag, values) =>
  make("tr", "", ...values.map(value => make(tag, "", String(value))));

// The body of a row, by kind.
const BODIES = {
  answers: row => [make("div", "columns", ...row.answers.map(
    ([name, answer, outcome]) => make("div", "", label(name, outcome), said(answer))))],

  revisions: row => {
    const parts = [label("initial response", row.outcomes[0]), said(row.initial)];
    let before = row.initial;
    row.rounds.forEach(({principle, critique, revision}, k) => {
      const last = k + 1 === row.rounds.length && !row.stopped;
      parts.push(label(`round ${k + 1}: ${principle}`));
      if (critique !== null) parts.push(said(critique, "critique"));
      parts.push(label(last ? "final revision" : "revision", row.outcomes[k + 1]));
      parts.push(revised(revision, before));
      before = revision;
    });
    if (row.stopped) {
      parts.push(label(`${row.stopped.principle}: a critique that finds nothing`));
      parts.push(said(row.stopped.critique, "critique"));
    }
    return parts;
  },

  comparisons: row => {
    const p = row.p_first, bar = make("div", "bar", make("i"));
    bar.firstChild.style.width = 100 * p + "%";
    const side = (name, best) => make("div", best ? "best" : "",
      label(name + (best ? ", preferred" : ""), row.better === name ? "judge: better" : ""),
      said(row[name]));
    const votes = row.votes.map(vote => cells("td", [
      vote.principle, vote.order.replace(",", ", "),
      fixed(vote.logp_first), fixed(vote.logp_second),
      fixed(1 / (1 + Math.exp(vote.logp_second - vote.logp_first))),
      vote.judge.split("/").pop()]));
    const head = cells("th", ["principle", "shown as", "log-prob first", "log-prob second",
      "P(first)", "feedback model"]);
    const rationales = row.votes.filter(vote => vote.rationale).flatMap(vote => [
      label(`${vote.principle}, shown as ${vote.order}: rationale`),
      said(vote.rationale, "critique")]);
    return [make("div", "columns", side("first", p > 0.5), side("second", p < 0.5)), bar,
      make("div", "label", `label: P(first is better) = ${p.toPrecision(3)}, ${row.tags[0]}`),
      votes.length ? make("div", "wide", make("table", "", head, ...votes)) : null,
      ...rationales];
  },

  episodes: row => [label(`iteration ${row.step}, score ${fixed(row.score)}`), said(row.response)],
};

const lastTurn = row => row.prompt[row.prompt.length - 1].content;
function strings(value) {
  if (typeof value === "string") return value;
  return value && typeof value === "object" ? Object.values(value).map(strings).join("\n") : "";
}
const haystack = row => row.haystack ??= strings(row).toLowerCase();

function fill(details) {  // when the row is opened
  if (details.childElementCount > 1) return;
  const row = details.row;
  const earlier = row.prompt.slice(0, -1).flatMap(turn => [label(turn.role), said(turn.content)]);
  details.append(make("div", "body", ...earlier, ...BODIES[state.kind](row)));
}
function entry(row) {
  const tags = state.kind === "episodes" ? [`iteration ${row.step}`, `score ${fixed(row.score)}`]
    : [];
  const details = make("details", "row", make("summary", "",
    text("span", "title", lastTurn(row)),
    make("span", "tags", ...[...tags, ...row.tags].map(tag))));
  details.row = row;
  details.addEventListener("toggle", () => details.open && fill(details));
  return details;
}
function options(select, all, names) {
  const counts = new Map();
  for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
  const made = [...counts].sort().map(([name, count]) => [name, `${name} (${count})`]);
  select.replaceChildren(...[["", all], ...made].map(
    ([value, shown]) => Object.assign(make("option", "", shown), {value})));
  select.disabled = !counts.size;
}
function chooseKind(kind) {
  Object.assign(state, {kind, principle: "", outcome: ""});
  for (const button of get("kinds").children)
    button.setAttribute("aria-pressed", button.value === kind);
  options(get("principle"), "every principle", KINDS[kind].rows.flatMap(row => row.principles));
  options(get("outcome"), "every outcome", KINDS[kind].rows.flatMap(row => row.tags));
}
function show() {
  const {rows, count, file} = KINDS[state.kind], wanted = words();
  found = rows.filter(row => (!state.principle || row.principles.includes(state.principle))
    && (!state.outcome || row.tags.includes(state.outcome))
    && wanted.every(word => haystack(row).includes(word)));
  list.replaceChildren(...found.slice(0, state.shown).map(entry));
  if (!found.length) list.append(nothing());
  get("more").hidden = found.length <= state.shown;
  get("count").textContent = `${found.length} of ${rows.length}`
    + (count > rows.length ? `; all ${count} in ${file}` : "");
}
function nothing() {
  const clear = make("button", "", "clear the search");
  clear.type = "button";
  clear.addEventListener("click", () => {
    get("search").value = "";
    chooseKind(state.kind);
    change("q", "");
  });
  return make("p", "note", `No ${state.kind} have all of this. `, clear);
}
function change(key, value) {
  Object.assign(state, {[key]: value, shown: SHOWN});
  show();
  const kept = Object.entries(state).filter(([key, value]) => key !== "shown" && value);
  try { history.replaceState(null, "", "#" + new URLSearchParams(kept)); }
  catch { /* the page is inside another document */ }
}
function follow() {  // what the address asks for; whether it asks for transcripts
  const asked = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  chooseKind(Object.hasOwn(KINDS, asked.kind ?? "") ? asked.kind : Object.keys(KINDS)[0]);
  Object.assign(state, {q: asked.q ?? "", shown: SHOWN});
  get("search").value = state.q;
  for (const id of ["principle", "outcome"]) {
    get(id).value = asked[id] ?? "";
    if (get(id).selectedIndex < 0) get(id).value = "";  // of a page of another version
    state[id] = get(id).value;
  }
  show();
  return "kind" in asked;
}
function move(by) {
  const rows = [...list.querySelectorAll("details")];
  const at = rows.findIndex(row => row.contains(document.activeElement));
  const next = rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + by))];
  if (!next) return;
  next.firstChild.focus({preventScroll: true});
  next.scrollIntoView({block: "nearest"});
}
function press(event) {
  const search = get("search"), writing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === search) {
    search.value = "";
    change("q", "");
    search.blur();
  } else if (event.key === "Escape") {
    for (const open of list.querySelectorAll("details[open]")) open.open = false;
  } else if (writing) {
    if (event.key === "Enter" && event.target === search) move(0);
  } else if (event.key === "/") {
    event.preventDefault();
    search.focus();
    search.select();
  } else if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
}

if (Object.keys(KINDS).length) {
  get("browser").hidden = false;
  get("kinds").append(...Object.entries(KINDS).map(([kind, {count}]) => {
    const button = make("button", "", kind + " ", make("small", "", String(count)));
    Object.assign(button, {type: "button", value: kind});
    button.addEventListener("click", () => { chooseKind(kind); change("kind", kind); });
    return button;
  }));
  for (const id of ["principle", "outcome"])
    get(id).addEventListener("change", event => change(id, event.target.value));
  get("search").addEventListener("input", event => change("q", event.target.value));
  get("more").addEventListener("click", () => {
    list.append(...found.slice(state.shown, state.shown += SHOWN).map(entry));
    get("more").hidden = found.length <= state.shown;
  });
  const place = follow() ? "transcripts" : location.hash.slice(1);
  // The list has changed the length of the page. A browser restores the place when it reloads.
  if (performance.getEntriesByType("navigation")[0]?.type !== "reload")
    get(place)?.scrollIntoView();
  addEventListener("hashchange", () => {
    if (location.hash.startsWith("#kind=") && follow()) get("transcripts").scrollIntoView();
  });
  document.addEventListener("keydown", press);
  addEventListener("beforeprint", () => {  // opens the first rows
    for (const row of [...list.querySelectorAll("details:not([open])")].slice(0, 20)) {
      fill(row);
      row.open = row.printed = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const row of list.querySelectorAll("details"))
      if (row.printed) row.open = row.printed = false;
  });
}

get("theme").hidden = false;
get("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = root.style.colorScheme ? root.style.colorScheme === "dark" : system.matches;
  root.style.colorScheme = dark ? "light" : "dark";
  try { localStorage.setItem("minicai-theme", root.style.colorScheme); }
  catch { /* it is lost when the page is loaded again */ }
});

for (const plot of document.querySelectorAll("figure > svg"))
  plot.addEventListener("click", () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else plot.parentElement.requestFullscreen?.().catch(() => {});  // refused inside other pages
  });

// A live page reloads, but not while somebody reads, marks or types.
const live = Number(document.body.dataset.live);  // seconds
if (live) setInterval(() => {
  const reading = document.querySelector("details[open]") || getSelection().toString();
  if (!reading && document.activeElement === document.body) location.reload();
}, 1000 * live);
