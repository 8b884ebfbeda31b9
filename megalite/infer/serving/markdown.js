"use strict";
/* Markdown of a model as DOM nodes: what chats use of CommonMark, and tables and ~~strikes~~ of GitHub's.

A text becomes elements named here and text nodes, and is never parsed as HTML; a link leads to http, https or mail alone,
and pictures become links, since the page loads nothing from elsewhere. The time is linear in the text: a model that
writes nothing but brackets must not stop the page. */

const DEEPEST = 6;          // of quotes and lists in one another, and of emphasis
const LONGEST_LABEL = 1000; // characters of a link's text or address that are looked at
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const FENCE = /^( *)(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const COLUMNS = /^[ \t]*\|?[ \t:|-]*-[ \t:|-]*$/;
const MARKS = "\\`*_{}[]()<>#+-.!|~\"'$&,/:;=?@^%";

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function markdown(text) {
  const into = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), into, 0);
  return into;
}

/* Blocks that are as before stay as they are, so that what a reader has selected or focused there does too. */
function showMarkdown(into, text) {
  const made = [...markdown(text).childNodes];
  let same = 0;
  while (same < made.length && into.childNodes[same]?.isEqualNode(made[same])) same++;
  while (into.childNodes.length > same) into.lastChild.remove();
  into.append(...made.slice(same));
}

function blocks(lines, into, depth) {
  for (let at = 0; at < lines.length;) {
    const line = lines[at];
    let found;
    if (!line.trim()) at++;
    else if ((found = FENCE.exec(line))) at = fence(lines, at, found, into);
    else if ((found = HEADING.exec(line))) {
      const heading = element("h" + found[1].length);
      inline(found[2].trim().replace(/(^|[ \t])#+$/, ""), heading);
      into.append(heading);
      at++;
    } else if (RULE.test(line)) { into.append(element("hr")); at++; }
    else if (depth < DEEPEST && QUOTE.test(line)) at = quote(lines, at, into, depth);
    else if (depth < DEEPEST && ITEM.test(line)) at = list(lines, at, into, depth);
    else if (isTable(lines, at)) at = table(lines, at, into);
    else at = paragraph(lines, at, into, depth);
  }
}

const begins = (line, depth) => FENCE.test(line) || HEADING.test(line) || RULE.test(line)
  || (depth < DEEPEST && (QUOTE.test(line) || /^ *([-*+]|1[.)])[ \t]+\S/.test(line)));

function paragraph(lines, at, into, depth) {
  const first = at++;
  while (at < lines.length && lines[at].trim() && !begins(lines[at], depth) && !isTable(lines, at)) at++;
  const made = element("p");
  inline(lines.slice(first, at).join("\n").trimEnd(), made);
  into.append(made);
  return at;
}

/* A block of code; one that is not closed yet goes on to the end, as while it is written. */
function fence(lines, at, [, indent, mark, language], into) {
  const said = [];
  for (at++; at < lines.length; at++) {
    const line = lines[at].trim();
    if (line.startsWith(mark) && line === mark[0].repeat(line.length)) { at++; break; }
    said.push(lines[at].startsWith(indent) ? lines[at].slice(indent.length) : lines[at].trimStart());
  }
  const box = element("div", "code"), bar = element("div", "bar"), copy = element("button", "copy", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", language ? "Copy the " + language + " code" : "Copy the code");
  bar.append(element("span", "", language), copy);
  const pre = element("pre");
  pre.append(element("code", "", said.join("\n")));
  box.append(bar, pre);
  into.append(box);
  return at;
}

function quote(lines, at, into, depth) {
  const said = [];
  while (at < lines.length && QUOTE.test(lines[at])) said.push(lines[at++].replace(QUOTE, ""));
  const made = element("blockquote");
  blocks(said, made, depth + 1);
  into.append(made);
  return at;
}

function list(lines, at, into, depth) {
  const [, outer, mark] = ITEM.exec(lines[at]), numbered = /\d/.test(mark), kind = mark.slice(-1);
  const made = element(numbered ? "ol" : "ul");
  if (numbered && parseInt(mark) !== 1) made.start = parseInt(mark);
  while (at < lines.length) {
    const found = ITEM.exec(lines[at]);
    if (!found || found[1].length > outer.length + 1 || found[1].length < outer.length) break;
    if (found[2].slice(-1) !== kind || RULE.test(lines[at])) break;
    // What belongs to an item stands deeper than its mark, or goes on with its paragraph.
    const inner = found[1].length + 2, said = [found[3] ?? ""];
    for (at++; at < lines.length; at++) {
      const line = lines[at], deep = line.length - line.trimStart().length;
      if (!line.trim()) {
        if (!(lines[at + 1]?.trim() && /^ */.exec(lines[at + 1])[0].length >= inner)) break;
        said.push("");
      } else if (deep >= inner) said.push(line.slice(Math.min(deep, inner + (numbered ? 1 : 0))));
      else if (begins(line, depth) || ITEM.test(line) || !said.at(-1)) break;
      else said.push(line);
    }
    // Items may stand apart.
    if (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at++;
    made.append(item(said, depth));
  }
  into.append(made);
  return at;
}

function item(said, depth) {
  const made = element("li"), task = /^\[([ xX])\][ \t]+/.exec(said[0]);
  if (task) {
    made.className = "task";
    made.append(element("span", "box", task[1] === " " ? "☐ " : "☑ "));
    said[0] = said[0].slice(task[0].length);
  }
  blocks(said, made, depth + 1);
  return made;
}

const cells = line => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map(cell => cell.trim().replaceAll("\\|", "|"));

const isTable = (lines, at) => lines[at].includes("|") && COLUMNS.test(lines[at + 1] ?? "")
  && cells(lines[at]).length === cells(lines[at + 1]).length;

function table(lines, at, into) {
  const names = cells(lines[at]), made = element("table"), body = element("tbody"), head = element("thead");
  const sides = cells(lines[at + 1]).map(
    cell => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (values, tag) => {
    const line = element("tr");
    names.forEach((_, column) => {
      const cell = element(tag, sides[column]);
      inline(values[column] ?? "", cell);
      line.append(cell);
    });
    return line;
  };
  head.append(row(names, "th"));
  for (at += 2; at < lines.length && lines[at].trim() && lines[at].includes("|"); at++) body.append(row(cells(lines[at]), "td"));
  made.append(head, body);
  const box = element("div", "table");
  box.append(made);
  into.append(box);
  return at;
}

function inline(text, into, depth = 0) {
  const closed = new Set(); // what is known to have no end from here on, so that it is looked for once
  let plain = "", at = 0;
  const add = node => { into.append(plain, node); plain = ""; };
  const inner = (tag, from, to) => {
    const made = element(tag);
    inline(text.slice(from, to), made, depth + 1);
    return made;
  };
  while (at < text.length) {
    const letter = text[at];
    let found;
    if (letter === "\\" && at + 1 < text.length && MARKS.includes(text[at + 1])) { plain += text[at + 1]; at += 2; continue; }
    if (letter === "`" && (found = codeAt(text, at, closed))) {
      add(element("code", "", found.said));
      at = found.ends;
      continue;
    }
    if ((letter === "[" || (letter === "!" && text[at + 1] === "[")) && depth < DEEPEST && (found = linkAt(text, at))) {
      const link = linkTo(found.address);
      if (found.said) inline(found.said, link, DEEPEST);
      else link.textContent = found.address;
      add(link);
      at = found.ends;
      continue;
    }
    if (letter === "h" && !/\w/.test(text[at - 1] ?? "") && (found = addressAt(text, at))) {
      const link = linkTo(found);
      link.textContent = found;
      add(link);
      at += found.length;
      continue;
    }
    if ("*_~".includes(letter) && depth < DEEPEST) {
      const length = runAt(text, at);
      if ((found = emphasisAt(text, at, length, closed))) {
        const from = at + length;
        if (letter === "~") add(inner("del", from, found));
        else if (length === 1) add(inner("em", from, found));
        else if (length === 2) add(inner("strong", from, found));
        else { const both = element("strong"); both.append(inner("em", from, found)); add(both); }
        at = found + length;
      } else { plain += text.slice(at, at + length); at += length; }
      continue;
    }
    if (letter === "`") { const length = runAt(text, at); plain += text.slice(at, at + length); at += length; continue; }
    plain += letter;
    at++;
  }
  if (plain) into.append(plain);
}

function runAt(text, at) {
  let ends = at + 1;
  while (text[ends] === text[at]) ends++;
  return ends - at;
}

function codeAt(text, at, closed) {
  const length = runAt(text, at);
  if (closed.has("`" + length)) return null;
  for (let next = text.indexOf("`", at + length); next >= 0;) {
    const other = runAt(text, next);
    if (other === length) {
      const said = text.slice(at + length, next).replaceAll("\n", " ");
      const padded = said.length > 2 && said[0] === " " && said.at(-1) === " " && said.trim();
      return {said: padded ? said.slice(1, -1) : said, ends: next + length};
    }
    next = text.indexOf("`", next + other);
  }
  closed.add("`" + length);
  return null;
}

/* Where the text of an emphasis that begins at `at` ends; null where it is none. */
function emphasisAt(text, at, length, closed) {
  const mark = text[at], name = mark + length, word = /[\p{L}\p{N}]/u;
  if (length > 3 || (mark === "~" && length !== 2) || closed.has(name)) return null;
  if (/\s/.test(text[at + length] ?? " ") || (mark === "_" && word.test(text[at - 1] ?? ""))) return null;
  if (name === "*1" && /\d/.test(text[at - 1] ?? "") && /\d/.test(text[at + 1])) return null; // 2*3*4
  for (let next = text.indexOf(mark, at + length); next >= 0;) {
    const other = runAt(text, next), fits = other === length || (other === 3 && length < 3 && mark !== "~");
    const ends = next + other;
    if (fits && !/\s|\\/.test(text[next - 1]) && !(mark === "_" && word.test(text[ends] ?? ""))) return ends - length;
    next = text.indexOf(mark, ends);
  }
  closed.add(name);
  return null;
}

/* A link or picture that begins at `at`, if it leads where the page lets links lead. */
function linkAt(text, at) {
  const from = text.indexOf("[", at) + 1, last = Math.min(text.length, from + LONGEST_LABEL);
  let open = 1, to = from;
  for (; to < last && open; to++) open += text[to] === "[" ? 1 : text[to] === "]" ? -1 : 0;
  if (open || text[to] !== "(") return null;
  const found = /^\(<?((?:[^\s()<>]|\([^\s()<>]*\)){1,1000})>?(?:[ \t]+"[^"\n]{0,500}")?\)/.exec(text.slice(to, to + 2 * LONGEST_LABEL));
  if (!found || !leadsOut(found[1])) return null;
  return {said: text.slice(from, to - 1), address: found[1], ends: to + found[0].length};
}

function addressAt(text, at) {
  const found = /^https?:\/\/[^\s<>"`]{1,2000}/.exec(text.slice(at, at + 2010));
  if (!found) return null;
  let address = found[0].replace(/[.,:;!?'*_~\]]{1,9}$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  return leadsOut(address) ? address : null;
}

function leadsOut(address) {
  try { return ["http:", "https:", "mailto:"].includes(new URL(address).protocol); } catch { return false; }
}

function linkTo(address) {
  const link = element("a");
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.title = address;
  return link;
}
