"use strict";
// Puts the page together for the model that is served.
function begin(model) {
  document.title = `${model.model}: try it`;
  byId("model").textContent = model.model;
  byId("facts").textContent = [model.task, model.variant].filter(Boolean).join(" · ");
  byId("auth").hidden = !model.secured;
  const task = TASKS[model.task === "text-classification" && model.labels === 1 ? "rerank" : model.task];
  byId("heading").textContent = task.heading;
  const inputs = new Map();
  for (const [name, label, value, rows] of task.fields) {
    const tag = rows === 1 ? "input" : "textarea";
    const input = make(tag, { value: value.replace("{mask}", model.mask), spellcheck: false, required: true });
    if (rows > 1) input.rows = rows;
    inputs.set(name, input);
    byId("fields").append(make("label", {}, label, input));
  }
  if (task.insert) {
    const input = inputs.get("text");
    const insert = make("button", { type: "button", className: "plain", textContent: `Insert ${model.mask}` });
    insert.onclick = () => { input.setRangeText(model.mask, input.selectionStart, input.selectionEnd, "end"); input.focus(); };
    byId("ask").after(insert);
  }
  const form = byId("form"), status = byId("status"), output = byId("output"), button = byId("ask");
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (button.disabled) return;
    button.disabled = true;
    status.className = "soft";
    status.textContent = "…";
    const values = Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]));
    try {
      const { answer, ms, timing } = await task.ask(values);
      output.replaceChildren(...task.draw(values, answer, model));
      status.className = "good";
      const computed = /infer;dur=([\d.]+)/.exec(timing || "");
      status.textContent = `${ms.toFixed(0)} ms${computed ? `, ${Number(computed[1]).toFixed(1)} ms of them computed` : ""}`;
    } catch (error) {
      status.className = "bad";
      status.textContent = error.message;
    }
    button.disabled = false;
  };
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

ask("api/model").then(({ answer }) => begin(answer)).catch((error) => {
  byId("status").className = "bad";
  byId("status").textContent = error.message;
});
watch();
