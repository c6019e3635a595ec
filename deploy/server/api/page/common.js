"use strict";
// What the parts of the page share. Texts go in as text nodes only, never as markup.
const make = (tag, attributes = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
};

const byId = (id) => document.getElementById(id);

// Asks a route of this server; returns its JSON and what it cost. Paths are relative: the server may have a prefix.
async function ask(path, body) {
  const headers = {};
  const key = byId("key").value;
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const begun = performance.now();
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body),
  });
  const text = await response.text();
  let answer = null;
  try { answer = JSON.parse(text); } catch { /* told below */ }
  if (!response.ok || answer === null) {
    const error = answer && answer.error;
    throw new Error(`${response.status}: ${(error && error.message) || error || text.slice(0, 200) || "no answer"}`);
  }
  return { answer, ms: performance.now() - begun, timing: response.headers.get("server-timing") };
}

const linesOf = (text) => text.split("\n").filter((line) => line.trim());

// A name with a score from 0 to 1 behind it, in a list.
function bar(name, score, shown = score.toFixed(3)) {
  const cell = make("span", {}, make("b", { textContent: name }));
  cell.style.setProperty("--part", `${100 * Math.min(1, Math.max(0, score))}%`);
  return make("li", { className: "bar" }, cell, make("output", { textContent: shown }));
}

const bars = (rows) => make("ol", {}, ...rows.map((row) => bar(...row)));

// The same label always has the same colour.
function hueOf(label) {
  let hash = 7;
  for (const character of label) hash = (hash * 31 + character.codePointAt(0)) % 1009;
  return (hash * 137) % 360;
}

// A text with parts of it marked: {start, end, label}, in code points, which may not overlap.
function marked(text, parts) {
  const characters = [...text];
  const node = make("p", { className: "text" });
  let place = 0;
  for (const { start, end, label, title } of [...parts].sort((one, two) => one.start - two.start)) {
    if (start < place) continue;
    const mark = make("mark", { title }, characters.slice(start, end).join(""));
    if (label) mark.append(make("small", { textContent: label }));
    mark.style.setProperty("--hue", hueOf(label || "answer"));
    node.append(characters.slice(place, start).join(""), mark);
    place = end;
  }
  node.append(characters.slice(place).join(""));
  return node;
}
