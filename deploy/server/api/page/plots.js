"use strict";
// What the server does now, from the differences of its counters every two seconds; nothing is asked while nobody looks.
const EVERY_MS = 2000;
const KEPT = 60;  // As wide as the plot's box in try.html.
// Behind whatever prefix the server has.
const OPERATION = ["/metrics", "/live", "/ready", "/health", "/ping", "/docs", "/openapi.json", "/api/model"];

// Sums of the samples that the plots need, from Prometheus' text.
function countersOf(text) {
  const sums = { requests: 0, batches: 0, texts: 0, tokens: 0, buckets: new Map() };
  const plain = { serve_batch_texts_count: "batches", serve_batch_texts_sum: "texts", serve_batch_tokens_sum: "tokens" };
  for (const line of text.split("\n")) {
    const cut = line.lastIndexOf(" ");
    const [name, value] = [line.slice(0, cut), Number(line.slice(cut + 1))];
    if (name in plain) sums[plain[name]] = value;
    const found = /^serve_(requests_total|request_seconds_bucket)\{endpoint="([^"]*)",(?:status|le)="([^"]*)"\}$/.exec(name);
    if (!found) continue;
    const [, kind, endpoint, label] = found;
    if (OPERATION.some((path) => endpoint.endsWith(path))) continue;
    const le = Number(label.replace("+Inf", "Infinity"));
    if (kind === "requests_total") sums.requests += value;
    else sums.buckets.set(le, (sums.buckets.get(le) ?? 0) + value);
  }
  return sums;
}

// The time in ms within which a part of the requests between two readings was answered; null: there were none.
function quantile(part, now, before) {
  const rows = [...now.buckets].map(([le, count]) => [le, count - (before.buckets.get(le) ?? 0)]);
  rows.sort((one, two) => one[0] - two[0]);
  const all = rows.length ? rows[rows.length - 1][1] : 0;
  if (!(all > 0)) return null;
  let [low, seen] = [0, 0];
  for (const [le, count] of rows) {
    if (count >= part * all) {
      if (le === Infinity) return 1e3 * low;
      return 1e3 * (low + (le - low) * (part * all - seen) / Math.max(1, count - seen));
    }
    [low, seen] = [le, count];
  }
  return 1e3 * low;
}

const short = (value) => (value === null ? "–" : value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

class Plot {
  // A line of values over time, and a second, dashed one.
  constructor(title, unit, told = null) {
    Object.assign(this, { title, unit, told, rows: [] });
    this.value = make("span", { className: "value", textContent: "–" });
    this.svg = byId("plot").content.firstElementChild.cloneNode(true);
    this.paths = this.svg.querySelectorAll("path");
    this.figure = make("figure", {}, make("figcaption", {}, title, this.value), this.svg);
    this.svg.setAttribute("aria-label", `${title}: nothing measured yet`);
  }

  add(first, second = null) {
    this.rows = [...this.rows, [first, second]].slice(-KEPT);
    const top = Math.max(...this.rows.flat().filter((value) => value !== null), 1e-9);
    const line = (which) => {
      let path = "", pen = "M";
      this.rows.forEach((row, index) => {
        if (row[which] === null) { pen = "M"; return; }
        const point = `${KEPT - this.rows.length + index} ${(100 - 92 * row[which] / top).toFixed(1)}`;
        path += pen === "M" ? `M${point}h0` : `L${point}`;  // A single one is a dot.
        pen = "L";
      });
      return path;
    };
    const areas = line(0).split("M").filter(Boolean).map((part) => {
      const points = part.split("L");
      return `M${points[0].split(" ")[0]} 100L${part}L${points[points.length - 1].split(" ")[0]} 100Z`;
    });
    this.paths[0].setAttribute("d", areas.join(""));
    this.paths[1].setAttribute("d", line(0));
    this.paths[2].setAttribute("d", line(1));
    if (first === null) {
      this.value.textContent = "–";
      this.svg.setAttribute("aria-label", `${this.title}: no requests now`);
      return;
    }
    const now = this.told ? this.told(first, second) : `${short(first)} ${this.unit}`;
    this.value.textContent = now;
    this.svg.setAttribute("aria-label", `${this.title}: now ${now}`);
  }
}

function watch() {
  const rate = new Plot("Requests", "/s");
  const latency = new Plot("Latency p50, p95", "ms", (half, most) => `${half.toFixed(0)}, ${most.toFixed(0)} ms`);
  const batch = new Plot("Batch", "texts", (texts, tokens) => `${short(texts)} texts`);
  const tokens = new Plot("Tokens", "/s");
  byId("plots").append(...[rate, latency, batch, tokens].map((plot) => plot.figure));
  let before = null, beforeMs = 0;
  const tick = async () => {
    if (document.hidden) { before = null; return; }
    let text;
    try { text = await (await fetch("metrics")).text(); } catch { before = null; return; }
    const now = countersOf(text), nowMs = performance.now();
    if (before !== null) {
      const seconds = (nowMs - beforeMs) / 1e3;
      const more = (name) => Math.max(0, now[name] - before[name]);
      rate.add(more("requests") / seconds);
      latency.add(quantile(0.5, now, before), quantile(0.95, now, before));
      batch.add(more("batches") ? more("texts") / more("batches") : null);
      tokens.add(more("tokens") / seconds);
    }
    [before, beforeMs] = [now, nowMs];
  };
  tick();
  setInterval(tick, EVERY_MS);
}
