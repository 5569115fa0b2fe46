// The settings of a conversation, and of the second answer where two are compared.

import { shareWords } from "./experts.js";
import { button, h } from "./html.js";

/** Fills the panel. `change` is told {settings} or {other}, whichever has changed. */
export function settingsView(panel, conversation, models, { change, compareWith, close }) {
  const { settings, other } = conversation;
  const compare = h("input", { type: "checkbox", checked: Boolean(other), onchange: (event) => compareWith(event.target.checked ? { ...settings } : null) });
  panel.setAttribute("aria-label", "Settings");
  panel.replaceChildren(
    h("div", { class: "row" }, h("h2", {}, "Settings"), h("span", { class: "space" }), button("Close", "close", close)),
    form(settings, models, (next) => change({ settings: next })),
    h("label", { class: "switch" }, compare, h("span", {}, "Compare with a second answer"), h("small", {}, "Both are written at once, side by side.")),
    other ? h("section", { class: "second" }, h("h3", {}, "Second answer"), form(other, models, (next) => change({ other: next }))) : "",
  );
}

function form(settings, models, change) {
  const model = models.find((each) => each.name === settings.model) ?? models[0];
  let current = settings;
  const set = (name, value) => {
    current = { ...current, [name]: value };
    change(current);
  };
  return h(
    "div",
    { class: "settings" },
    models.length > 1 ? field("Model", choice(models.map((each) => [each.name, each.state === "loaded" ? each.name : `${each.name} (not loaded)`]), settings.model ?? model.name, (value) => set("model", value))) : null,
    field("System prompt", area(settings.system, (value) => set("system", value))),
    field("Thinking", choice([["", "As the model does"], ["on", "On"], ["off", "Off"]], { true: "on", false: "off" }[settings.thinking] ?? "", (value) => set("thinking", { on: true, off: false }[value] ?? null))),
    field("Longest thought, in tokens", number(settings.budget, { min: 1, step: 1, placeholder: "no limit" }, (value) => set("budget", value))),
    field("Temperature", number(settings.temperature, { min: 0, max: 5, step: 0.1, placeholder: model?.defaults.temperature }, (value) => set("temperature", value))),
    field("Top p", number(settings.top_p, { min: 0.01, max: 1, step: 0.01, placeholder: model?.defaults.top_p }, (value) => set("top_p", value))),
    field("Longest answer, in tokens", number(settings.max_tokens, { min: 1, step: 1, placeholder: "no limit" }, (value) => set("max_tokens", value))),
    field("Seed", number(settings.seed, { step: 1, placeholder: "drawn" }, (value) => set("seed", value))),
    model?.topk ? expertsField(settings.active_experts, model, (value) => set("active_experts", value)) : null,
  );
}

function expertsField(value, model, set) {
  const words = (count) => `${count} of ${model.num_experts}: ${shareWords(model, count)}`;
  const output = h("output", {}, words(value ?? model.topk));
  const range = h("input", { type: "range", min: 1, max: model.most_active, step: 1 });
  range.value = value ?? model.topk;
  range.addEventListener("input", () => {
    output.textContent = words(Number(range.value));
    set(Number(range.value) === model.topk ? null : Number(range.value));
  });
  return h("label", { class: "field wide" }, h("span", {}, "Experts per token"), range, output);
}

function field(name, input) {
  input.setAttribute("aria-label", name); // a label that holds a list would be named by what is chosen, too
  return h("label", { class: input.tagName === "TEXTAREA" ? "field wide" : "field" }, h("span", {}, name), input);
}

function number(value, properties, set) {
  const input = h("input", { type: "number", inputmode: "decimal", ...properties });
  input.value = value ?? "";
  input.addEventListener("change", () => {
    if (input.reportValidity()) set(input.value === "" ? null : Number(input.value));
  });
  return input;
}

function choice(options, value, set) {
  const select = h("select", { onchange: (event) => set(event.target.value) }, ...options.map(([key, words]) => h("option", { value: key }, words)));
  select.value = value;
  return select;
}

function area(value, set) {
  const input = h("textarea", { rows: 3, placeholder: "none" });
  input.value = value;
  input.addEventListener("change", () => set(input.value));
  return input;
}
