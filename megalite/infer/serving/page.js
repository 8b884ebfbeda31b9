"use strict";
/* The page that talks to the served models. A talk is a list of turns; a turn has a text and an answer of each model that
was asked; an answer has a version for each time it was given. All that is seen is drawn from it. */

const $ = id => document.getElementById(id);
const ICONS = {
  up: "M7 21V10l4-7c1.500 0 2.300 1 2 2.500L12.300 9H19a2 2 0 0 1 2 2.400l-1.400 7.200A3 3 0 0 1 16.700 21H7zM7 10H3v11h4",
  down: "M17 3v11l-4 7c-1.500 0-2.300-1-2-2.500l.7-3.500H5a2 2 0 0 1-2-2.400l1.400-7.200A3 3 0 0 1 7.300 3H17zm0 11h4V3h-4",
  edit: "M4 20h4L19.500 8.500l-4-4L4 16v4zM13.500 6.500l4 4",
  copy: "M9 9V4h11v11h-5M4 9h11v11H4z",
  again: "M20 5v5h-5M19.500 10A8 8 0 1 0 20 14",
  back: "M15 5l-7 7 7 7",
  forth: "M9 5l7 7-7 7",
};
const SAMPLES = {
  chat: ["What can you help me with?", "Explain what a tokenizer does, in three sentences.",
    "Write a Python function that tells whether a word is a palindrome."],
  text: ["Once upon a time", "The most important thing about", "def main():"],
  sources: [],
};
const EMPTY = {
  chat: ["What shall we talk about?", "Rate an answer, or correct it: finetuning can learn from both."],
  text: ["Write a beginning", "The model goes on from it. It has no chat template, so every text stands for itself."],
  sources: ["Write a source", "The model answers with a target: a translation, a summary, or whatever it was trained for."],
};
const GONE = "The server cannot be reached. Is it still running?";
const KEPT = ["temperature", "top_p", "max_tokens", "seed", "system"];
let about = {model: "", chat: true}, models = [], chosen = [], talk = [], running = null;
let served; // the fingerprint of the model that answered last: the server may have loaded another
const kind = () => (about.chat ? "chat" : about.sources ? "sources" : "text");
const place = () => "megalite talk with " + about.model;

/* ---- what is kept over a reload ---- */

function keep() {
  const settings = Object.fromEntries(KEPT.map(name => [name, $(name).value]));
  // Full or forbidden storage costs the talk at the next reload, never this one.
  try { localStorage.setItem(place(), JSON.stringify({talk, settings, chosen})); } catch { /* see above */ }
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(place()));
    for (const name of KEPT) $(name).value = kept.settings[name] ?? $(name).value;
    chosen = kept.chosen;
    talk = kept.talk;
    talk.forEach(turn => { turn.answers = turn.answers.filter(isSaid); });
    talk = talk.filter(turn => turn.answers.length);
  } catch { talk = []; }
}

/* Whether there is something of an answer, which may have been under way when it was kept. */
function isSaid(answer) {
  answer.versions = answer.versions.filter(version => version.said);
  answer.versions.forEach(version => delete version.busy);
  answer.shown = Math.min(answer.shown, answer.versions.length - 1);
  return answer.versions.length;
}

/* ---- the server ---- */

function headers() {
  const key = $("key").value.trim();
  return {"Content-Type": "application/json", ...(key ? {Authorization: "Bearer " + key} : {})};
}

async function problemOf(response) {
  if (response.status === 401) { $("key-field").hidden = false; openSettings(true); $("key").focus(); }
  try { return (await response.json()).error.message; } catch { return "the server answered " + response.status; }
}

async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new Error(data.error.message);
      yield data;
    }
  }
}

function asked() {
  const values = {};
  for (const name of KEPT) if (name !== "system" && $(name).value !== "") values[name] = Number($(name).value);
  return values;
}

/* The messages before a turn's answer, as `model` has heard them: its own answers, or another's where it has none. */
function heard(model, turn) {
  if (!about.chat) return [{role: "user", content: turn.text}];
  const system = $("system").value.trim(), messages = system ? [{role: "system", content: system}] : [];
  for (const one of talk) {
    messages.push({role: "user", content: one.text});
    if (one === turn) break;
    const answer = one.answers.find(each => each.model === model) ?? one.answers[0];
    const said = answer?.versions[answer.shown].said;
    if (said) messages.push({role: "assistant", content: said});
    else messages.pop(); // a question that nobody answered
  }
  return messages;
}

/* Add what the model says to `version`, piece by piece; `tell` draws it. */
async function receive(version, model, signal, tell) {
  const path = about.chat ? "/v1/chat/completions" : "/v1/completions";
  const body = {model, ...(about.chat ? {messages: version.heard} : {prompt: version.heard[0].content}), stream: true,
    stream_options: {include_usage: true}, ...asked()};
  const began = performance.now();
  let first = 0, counted = 0;
  const response = await fetch(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal});
  if (!response.ok) throw new Error(await problemOf(response));
  for await (const data of pieces(response)) {
    version.id = data.id;
    if (data.system_fingerprint !== served) { served = data.system_fingerprint; findStep(); }
    const choice = data.choices[0], said = choice?.delta?.content || choice?.text || "", now = performance.now();
    if (said) { first ||= now; counted++; version.said += said; version.tokens = counted; version.first = (first - began) / 1000; }
    // Without pieces to tell the pace by, that of the whole.
    version.pace = counted > 1 ? (version.tokens - 1) / (now - first) * 1000 : version.tokens / (now - began) * 1000;
    if (choice?.finish_reason) { version.finish = choice.finish_reason; version.took = now - (counted > 1 ? first : began); }
    if (data.usage) {
      version.tokens = data.usage.completion_tokens;
      version.pace = (version.tokens - (counted > 1 ? 1 : 0)) / version.took * 1000;
    }
    tell();
  }
}

/* ---- a turn and its answers ---- */

async function send(text) {
  const turn = {text, answers: []};
  talk.push(turn);
  for (const model of chosen) turn.answers.push({model, versions: [], shown: -1});
  await ask(turn, turn.answers);
  if (!turn.answers.length && talk.includes(turn)) { // nobody said anything: to be sent again
    talk.splice(talk.indexOf(turn), 1);
    draw();
    if (!$("prompt").value) { $("prompt").value = text; fit(); }
  }
}

/* Get a version of each of the answers. What says nothing leaves no version, and an answer without one goes. */
async function ask(turn, answers) {
  const mine = running = new AbortController(), versions = answers.map(answer => {
    const version = {said: "", tokens: 0, pace: 0, heard: heard(answer.model, turn), busy: true};
    answer.shown = answer.versions.push(version) - 1;
    return version;
  });
  $("problems").replaceChildren();
  setBusy(true);
  draw();
  toEnd();
  await Promise.all(versions.map(async (version, number) => {
    const answer = answers[number];
    let due = false;
    const tell = () => {
      if (due) return;
      due = true;
      requestAnimationFrame(() => { due = false; if (talk.includes(turn)) follow(() => fill(turn, answer)); });
    };
    try {
      await receive(version, answer.model, mine.signal, tell);
    } catch (problem) {
      if (problem.name !== "AbortError") show(problem.name === "TypeError" ? GONE : problem.message);
    }
    delete version.busy;
    if (!version.said) {
      answer.versions.splice(answer.versions.indexOf(version), 1);
      answer.shown = answer.versions.length - 1;
      if (answer.shown < 0) turn.answers.splice(turn.answers.indexOf(answer), 1);
    }
    if (talk.includes(turn)) follow(() => drawTurn(turn));
  }));
  if (running === mine) { running = null; setBusy(false); }
  keep();
}

function setBusy(busy) {
  $("send").textContent = busy ? "Stop" : kind() === "text" ? "Go on" : "Send";
  $("talk").setAttribute("aria-busy", String(busy));
}

/* ---- drawing ---- */

const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

/* Stay at the end of the talk where the reader is there. */
function follow(change) {
  const box = $("scroll"), low = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  change();
  if (low) toEnd();
}

function show(problem) {
  const box = element("div", "problem", problem);
  box.setAttribute("role", "alert");
  $("problems").append(box);
  toEnd();
}

function button(icon, label, name, action) {
  const made = element("button"), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  made.append(svg);
  if (name) made.append(element("span", "name", name));
  made.onclick = action;
  return made;
}

function draw() {
  $("talk").replaceChildren();
  if (!talk.length) $("talk").append(emptyTalk());
  talk.forEach(drawTurn);
  document.body.classList.toggle("wide", chosen.length > 1 || talk.some(turn => turn.answers.length > 1));
}

function emptyTalk() {
  const [title, note] = EMPTY[kind()], made = element("div", "empty"), samples = element("div", "samples");
  for (const text of about.prompts?.length ? about.prompts : SAMPLES[kind()]) {
    const sample = element("button", "", text);
    sample.type = "button";
    sample.onclick = () => { if (!running) send(text); $("prompt").focus(); };
    samples.append(sample);
  }
  made.append(element("h2", "", title), element("p", "", note), samples);
  return made;
}

/* Draw a turn in its place. A button of it that has the focus keeps it. */
function drawTurn(turn) {
  const made = element("section", "turn"), held = document.activeElement?.getAttribute("aria-label");
  const old = [...$("talk").children].find(each => each.turn === turn), inside = old?.contains(document.activeElement);
  const column = [...(old?.querySelectorAll(".answer") ?? [])].findIndex(each => each.contains(document.activeElement));
  made.turn = turn;
  if (about.chat) made.append(question(turn));
  const answers = element("div", turn.answers.length > 1 ? "answers several" : "answers");
  for (const answer of turn.answers) answers.append(drawnAnswer(turn, answer));
  made.append(answers);
  if (old) old.replaceWith(made); else $("talk").append(made);
  if (inside && held) {
    const box = column < 0 ? made : made.querySelectorAll(".answer")[column];
    [...(box?.querySelectorAll("button") ?? [])].find(each => each.getAttribute("aria-label") === held)?.focus();
  }
}

function question(turn) {
  const row = element("div", "user"), bar = element("div", "tools");
  bar.append(button("edit", "Edit your message", "", () => { if (!running) editQuestion(turn, row); }));
  row.append(element("div", "text", turn.text), bar);
  return row;
}

function editQuestion(turn, row) {
  const last = talk.at(-1) === turn;
  editor(row, turn.text, "Your message", last ? "It is sent again." : "It is sent again; what came after it goes.", "Send",
    text => {
      talk.splice(talk.indexOf(turn));
      draw();
      send(text);
      $("prompt").focus();
    });
}

function drawnAnswer(turn, answer) {
  const made = element("div", about.chat ? "answer" : "answer plain");
  made.answer = answer;
  if (turn.answers.length > 1 || answer.model !== about.model) made.append(element("div", "who", answer.model));
  made.append(element("div", "text"), element("div", "tools"));
  fillAnswer(made, turn, answer);
  const version = answer.versions[answer.shown];
  if (version && !version.busy) tools(made, turn, answer, version);
  return made;
}

/* Show what there is of an answer by now. */
function fill(turn, answer) {
  const made = [...document.querySelectorAll(".answer")].find(each => each.answer === answer);
  if (made) fillAnswer(made, turn, answer);
}

function fillAnswer(made, turn, answer) {
  const version = answer.versions[answer.shown], text = made.querySelector(".text");
  if (!version) return;
  text.classList.toggle("busy", Boolean(version.busy));
  if (about.chat) showMarkdown(text, version.said);
  else text.replaceChildren(element("span", "given", about.sources ? turn.text + "\n" : turn.text), element("span", "", version.said));
  if (version.busy && version.tokens) made.querySelector(".tools").replaceChildren(pace(version));
}

function pace(version) {
  const tokens = version.tokens + (version.tokens === 1 ? " token" : " tokens");
  const made = element("span", "pace", tokens + (version.pace && isFinite(version.pace) ? ", " + version.pace.toLocaleString("en", {maximumSignificantDigits: 3}) + " tokens/s" : "")
    + (version.finish === "length" ? ", cut off there" : ""));
  if (version.first !== undefined) made.title = "the first after " + version.first.toFixed(2) + " s";
  return made;
}

function tools(row, turn, answer, version) {
  const bar = row.querySelector(".tools"), note = element("span", "note");
  const turnTo = step => () => { answer.shown += step; drawTurn(turn); keep(); };
  const copied = button("copy", "Copy the answer", "", () => copyText(version.said, copied));
  const up = button("up", "Good answer", "", () => rate("up")), down = button("down", "Bad answer", "", () => rate("down"));
  const correct = button("edit", "Correct it", "Correct", () => editor(row, version.original ?? version.said, "Your answer",
    "Write what it should have said.", "Save", text => rate("down", text)));
  const again = button("again", "Answer again", "", () => { if (!running) { dropAfter(turn); ask(turn, [answer]); } });

  async function rate(rating, correction) {
    const body = {...(about.chat ? {messages: version.heard} : {prompt: turn.text}), answer: version.said, rating, id: version.id, model: answer.model,
      ...(correction === undefined ? {} : {correction})};
    const response = await fetch("/v1/ratings", {method: "POST", headers: headers(), body: JSON.stringify(body)}).catch(() => null);
    if (!response) { show(GONE); return; }
    if (!response.ok) { show(await problemOf(response)); return; }
    version.rated = correction === undefined ? rating : "corrected";
    if (correction !== undefined) version.said = correction;
    drawTurn(turn);
    keep();
  }

  if (answer.versions.length > 1) {
    const back = button("back", "The version before", "", turnTo(-1)), forth = button("forth", "The next version", "", turnTo(1));
    back.disabled = answer.shown === 0;
    forth.disabled = answer.shown === answer.versions.length - 1;
    bar.append(back, element("span", "count", (answer.shown + 1) + "/" + answer.versions.length), forth);
  }
  bar.append(copied, again);
  if (!about.chat) bar.append(button("edit", "Edit your text", "", () => editor(row, turn.text, "Your text", "It is sent again.",
    kind() === "text" ? "Go on" : "Send", text => { if (!running) send(text); })));
  if (!about.sources) bar.append(up, down, correct);
  for (const [each, rating] of [[up, "up"], [down, "down"], [correct, "corrected"]]) {
    each.disabled = Boolean(version.rated);
    if (version.rated === rating) each.classList.add("chosen", rating);
  }
  if (version.rated) note.textContent = version.rated === "corrected" ? "Thank you, your answer is noted" : "Thank you, noted";
  bar.append(note, pace(version));
}

/* An answer that is given anew leaves nothing behind it that hung on the one before. */
function dropAfter(turn) {
  if (!about.chat || talk.at(-1) === turn) return;
  talk.splice(talk.indexOf(turn) + 1);
  draw();
}

/* Open an editor of `text` below `row`; Escape closes it. */
function editor(row, text, label, explanation, done, action) {
  if (row.querySelector(".editor")) { row.querySelector(".editor textarea").focus(); return; }
  const from = document.activeElement, box = element("div", "editor"), area = element("textarea"), line = element("div", "row");
  const save = element("button", "main", done), leave = element("button", "", "Cancel");
  area.value = text;
  area.setAttribute("aria-label", label);
  for (const each of [save, leave]) each.type = "button";
  line.append(element("span", "", explanation), leave, save);
  box.append(area, line);
  row.append(box);
  area.focus();
  box.scrollIntoView({block: "nearest"});
  const close = () => { box.remove(); from?.focus(); };
  leave.onclick = close;
  save.onclick = () => {
    if (!area.value.trim() || (label === "Your answer" && area.value === text)) { area.focus(); return; }
    close();
    action(area.value);
  };
  box.onkeydown = event => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save.click();
  };
}

async function copyText(text, from) {
  try { await navigator.clipboard.writeText(text); } catch { // only pages of https and of this machine have it
    const area = element("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    from.focus();
  }
  from.classList.add("copied");
  setTimeout(() => from.classList.remove("copied"), 1500);
}

/* ---- controls ---- */

function openSettings(open) {
  $("settings").hidden = !open;
  $("gear").setAttribute("aria-expanded", String(open));
}

function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = $("prompt").scrollHeight + 2 + "px";
}

function drawModels() {
  const step = about.step == null ? "" : "step " + about.step.toLocaleString("en");
  $("model").replaceChildren(element("span", "called", about.model), element("span", "step", step));
  $("prompt").placeholder = {chat: "Message " + chosen.join(" and "), sources: "A source", text: "A text to go on from"}[kind()];
  $("models").hidden = models.length < 2;
  $("model").hidden = models.length > 1;
  $("models").replaceChildren(...models.map(name => {
    const made = element("button", "", name), on = chosen.includes(name);
    made.type = "button";
    made.setAttribute("aria-pressed", String(on));
    made.onclick = () => {
      const others = models.filter(each => (each === name ? !on : chosen.includes(each)));
      if (others.length) chosen = others;
      drawModels();
      if (!running) draw();
      [...$("models").children].find(each => each.textContent === name).focus();
      keep();
    };
    return made;
  }));
}

async function findStep() {
  const response = await fetch("/v1/about").catch(() => null);
  if (response?.ok) about.step = (await response.json()).step;
  drawModels();
}

async function findModels() {
  const response = await fetch("/v1/models", {headers: headers()}).catch(() => null);
  if (response?.ok) models = (await response.json()).data.map(each => each.id);
  else models = [about.model];
  chosen = chosen.filter(name => models.includes(name));
  if (!chosen.length) chosen = [models.includes(about.model) ? about.model : models[0]];
  drawModels();
}

$("form").onsubmit = event => {
  event.preventDefault();
  if (running) { running.abort(); return; }
  const text = $("prompt").value;
  if (!text.trim()) return;
  $("prompt").value = "";
  fit();
  send(text);
};
$("prompt").oninput = fit;
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $("form").requestSubmit();
  }
  if (event.key === "ArrowUp" && !$("prompt").value && talk.length && about.chat && !running) {
    event.preventDefault();
    [...document.querySelectorAll("[aria-label='Edit your message']")].at(-1).click();
  }
};
document.onkeydown = event => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (!$("settings").hidden) { openSettings(false); $("gear").focus(); }
};
$("talk").onclick = event => {
  const copy = event.target.closest(".copy");
  if (copy) copyText(copy.closest(".code").querySelector("code").textContent, copy);
};
$("gear").onclick = () => openSettings($("settings").hidden);
$("fresh").onclick = () => { running?.abort(); talk = []; $("problems").replaceChildren(); keep(); draw(); $("prompt").focus(); };
$("settings").onchange = keep;
$("key").value = sessionStorage.getItem("key") || "";
$("key").onchange = () => { sessionStorage.setItem("key", $("key").value.trim()); findModels(); };
addEventListener("pagehide", keep);

fetch("/v1/about").then(response => response.json()).then(async told => {
  about = told;
  recall();
  document.title = about.model + " – megalite";
  $("system-field").hidden = !about.chat;
  $("key-field").hidden = !about.key;
  setBusy(false);
  chosen = chosen.length ? chosen : [about.model];
  models = [about.model];
  drawModels();
  draw();
  toEnd();
  if (about.key && !$("key").value) openSettings(true);
  else await findModels();
}).catch(() => show(GONE));
