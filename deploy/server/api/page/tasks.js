"use strict";
// A row for each thing that a model can be asked: its fields, the request it sends, and how the answer is drawn.
// Fields: [name, label, first value, lines]. `ask` returns what `ask` of common.js does, `draw` nodes.

function heatMap(texts, rows) {
  const lengths = rows.map((row) => Math.hypot(...row) || 1);
  const cosine = (i, j) => rows[i].reduce((sum, value, k) => sum + value * rows[j][k], 0) / lengths[i] / lengths[j];
  const head = make("tr", {}, make("th", { scope: "col", textContent: "Text" }),
    ...texts.map((_, index) => make("th", { scope: "col", textContent: index + 1 })));
  const body = texts.map((text, i) => make("tr", {},
    make("th", { scope: "row", title: text }, make("span", { textContent: `${i + 1} ` }), text),
    ...texts.map((_, j) => {
      const value = i === j ? 1 : cosine(i, j);
      const cell = make("td", { textContent: value.toFixed(2).replace("-0.00", "0.00"), className: value > 0.5 ? "strong" : "" });
      cell.style.setProperty("--part", `${100 * Math.max(0, value)}%`);
      return cell;
    })));
  return make("table", { ariaLabel: "Cosine of each text with each other" },
    make("thead", {}, head), make("tbody", {}, ...body));
}

const TASKS = {
  "feature-extraction": {
    heading: "How alike are these texts?",
    fields: [["texts", "Texts, one in each line", "A server answers requests.\nThe machine replies to what it is asked.\n" +
      "A fish swims in the sea.\nWhales live in the ocean.\nThe quota was rounded down.", 6]],
    ask: ({ texts }) => ask("api/embed", { inputs: linesOf(texts) }),
    draw: ({ texts }, { embeddings }) => [heatMap(linesOf(texts), embeddings)],
  },
  rerank: {
    heading: "Which text fits the query?",
    fields: [["query", "Query", "What is a quota?", 1],
      ["texts", "Texts, one in each line", "A part of the CPU time that a container may use.\nA fish swims in the sea.\n" +
        "Limits are rounded down to whole cores.", 5]],
    ask: ({ query, texts }) => ask("rerank", { query, texts: linesOf(texts) }),
    draw: ({ texts }, ranks) => [bars(ranks.map(({ index, score }) => [linesOf(texts)[index], score]))],
  },
  "text-classification": {
    heading: "What kind of text is it?",
    fields: [["text", "Text", "What a day! Nothing worked, and then everything did.", 3]],
    ask: ({ text }) => ask("api/classify", { inputs: text }),
    draw: (_, { predictions }) => [bars(predictions[0].map(({ label, score }) => [label, score]))],
  },
  "token-classification": {
    heading: "What does the text name?",
    fields: [["text", "Text", "Ada Lovelace worked with Charles Babbage in London.", 4]],
    ask: ({ text }) => ask("api/token-classify", { inputs: text }),
    draw: ({ text }, { predictions }) => {
      const found = predictions[0].map(({ start, end, entity_group: label, score }) => (
        { start, end, label, title: `${label}: ${score.toFixed(3)}` }));
      return [marked(text, found), ...(found.length ? [] : [make("p", { className: "soft", textContent: "No entities." })])];
    },
  },
  "question-answering": {
    heading: "What does the text answer?",
    fields: [["question", "Question", "Where did she work?", 1],
      ["context", "Text", "Ada Lovelace worked with Charles Babbage in London. She wrote the first program.", 5]],
    ask: ({ question, context }) => ask("api/answer", { inputs: { question, context }, top_k: 3 }),
    draw: ({ context }, { predictions }) => [
      marked(context, predictions[0].slice(0, 1).map(({ start, end }) => ({ start, end, label: "" }))),
      bars(predictions[0].map(({ answer, score }) => [answer, score]))],
  },
  "fill-mask": {
    heading: "Which words are missing?",
    fields: [["text", "Text", "Paris is the {mask} of France.", 3]],
    insert: true,
    ask: ({ text }) => ask("api/fill-mask", { inputs: text, top_k: 5 }),
    draw: ({ text }, { predictions }, { mask }) => {
      const parts = text.split(mask);
      let place = 0;
      const best = predictions[0].map((found) => found[0].token.trim());
      const filled = parts.map((part, index) => part + (best[index] ?? "")).join("");
      const marks = best.map((word, index) => {
        const start = place + [...parts[index]].length;
        place = start + [...word].length;
        return { start, end: place, label: "" };
      });
      const lists = predictions[0].flatMap((found, index) => [
        ...(best.length > 1 ? [make("h3", { textContent: `Mask ${index + 1}` })] : []),
        bars(found.map(({ token, score }) => [token, score]))]);
      return [marked(filled, marks), ...lists];
    },
  },
  "sparse-embedding": {
    heading: "Which words stand for the text?",
    fields: [["text", "Text", "A server answers requests.", 3]],
    ask: async ({ text }) => {
      const asked = await ask("embed_sparse", { inputs: text });
      const best = asked.answer[0].sort((one, two) => two.value - one.value).slice(0, 20);
      const ids = best.map(({ index }) => [index]);
      const words = best.length ? (await ask("decode", { ids, skip_special_tokens: false })).answer : [];
      return { ...asked, answer: { best, words, all: asked.answer[0].length } };
    },
    draw: (_, { best, words, all }) => [
      make("p", { className: "soft", textContent: `The ${best.length} heaviest of ${all} words` }),
      bars(best.map(({ value }, place) => [words[place], value / best[0].value, value.toFixed(3)]))],
  },
};
