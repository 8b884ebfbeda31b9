"use strict";
/* The queue of answers that nobody has rated: one is shown at a time, the one of which the model was least certain first. */

const $ = id => document.getElementById(id);
const GONE = "The server cannot be reached. Is it still running?";
const skipped = new Set(), rated = new Set();
let queue = [], waiting = 0;

function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

function show(problem) {
  $("problems").replaceChildren(...(problem ? [element("div", "problem", problem)] : []));
}

/* What the server answers, or null with the problem shown. */
async function ask(path, body) {
  const key = $("key").value.trim();
  const headers = {"Content-Type": "application/json", ...(key ? {Authorization: "Bearer " + key} : {})};
  const sending = body ? {method: "POST", headers, body: JSON.stringify(body)} : {headers};
  const response = await fetch(path, sending).catch(() => null);
  if (!response) { show(GONE); return null; }
  $("entry").hidden = response.status !== 401;
  const told = await response.json().catch(() => ({}));
  if (!response.ok) { show(told.error?.message ?? "the server answered " + response.status); return null; }
  show();
  return told;
}

async function load() {
  const told = await ask("/admin/review?limit=100");
  if (!told) { queue = []; $("item").replaceChildren(); $("count").textContent = ""; return; }
  sessionStorage.setItem("admin key", $("key").value);
  // The log may be behind: a rating is on its disk a moment after it was taken.
  const left = told.data.filter(each => !rated.has(each.id));
  queue = left.filter(each => !skipped.has(each.id));
  waiting = told.waiting - (told.data.length - left.length);
  next();
}

function next() {
  $("count").textContent = waiting + (waiting === 1 ? " waits" : " wait");
  const item = queue[0];
  if (!item) {
    $("item").replaceChildren(element("div", "empty", "Nothing waits to be reviewed."));
    return;
  }
  const messages = item.asked.messages ?? [{role: "user", content: item.asked.prompt}];
  const before = messages.slice(0, -1).map(each => element("p", "before", each.role + ": " + each.content));
  const user = element("div", "user");
  user.append(element("div", "text", messages.at(-1).content));
  const when = new Date(item.time * 1000).toLocaleString();
  const percent = 100 * Math.exp(item.score);
  const sure = item.score === null ? "" : ", a token's mean probability " + (percent < 1 ? "below 1" : percent.toFixed(0)) + "%";
  const box = element("textarea", "correction");
  box.rows = 4;
  box.placeholder = "What it should have said; may stay empty";
  box.setAttribute("aria-label", "Correction");
  const verdict = element("div", "verdict");
  for (const [name, kind, act] of [
    ["Good", "main", () => rate(item, "up")],
    ["Bad", "", () => rate(item, "down", box.value)],
    ["Take the correction", "", () => rate(item, "down", box.value, true)],
    ["Skip", "skip", () => { skipped.add(item.id); queue.shift(); next(); }],
  ]) {
    const button = element("button", kind, name);
    button.type = "button";
    button.onclick = act;
    verdict.append(button);
  }
  $("item").replaceChildren(...before, user, element("div", "said", item.answer),
    element("p", "facts", when + sure), box, verdict);
}

async function rate(item, rating, correction = "", wanted = false) {
  if (wanted && !correction.trim()) { show("The correction says nothing."); return; }
  if (!wanted && correction.trim()) { show("There is a correction: take it, or empty the field."); return; }
  const body = {...item.asked, answer: item.answer, rating, id: item.id, ...(wanted ? {correction} : {})};
  if (!await ask("/admin/review", body)) return;
  rated.add(item.id);
  queue.shift();
  waiting -= 1;
  if (queue.length) next(); else load();
}

$("entry").onsubmit = event => { event.preventDefault(); load(); };
$("again").onclick = () => { skipped.clear(); load(); };
$("key").value = sessionStorage.getItem("admin key") || "";
if ($("key").value) load(); else $("entry").hidden = false;
