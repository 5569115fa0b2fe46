// Questions that the page asks in its one dialog.

import { h } from "./html.js";

const dialog = () => document.getElementById("dialog");

function ask(title, ...content) {
  return new Promise((resolve) => {
    const box = dialog();
    const form = h("form", { method: "dialog" }, h("h2", { id: "dialog-title" }, title), ...content);
    box.setAttribute("aria-labelledby", "dialog-title");
    box.replaceChildren(form);
    box.returnValue = "";
    box.onclose = () => resolve(box.returnValue);
    box.onclick = (event) => {
      if (event.target === box) box.close("");
    };
    box.showModal();
  });
}

const buttons = (words, value = "yes") =>
  h("div", { class: "row end" }, h("button", { value: "", formnovalidate: true }, "Cancel"), h("button", { value, class: "strong" }, words));

export async function confirmed(title, words, action) {
  return (await ask(title, h("p", {}, words), buttons(action))) === "yes";
}

/** The text that was entered, or null. */
export async function entered(title, label, value, { type = "text", action = "Save" } = {}) {
  const input = h("input", { type, autocomplete: "off", required: true });
  input.value = value;
  const answer = await ask(title, h("label", { class: "field wide" }, h("span", {}, label), input), buttons(action));
  return answer === "yes" ? input.value : null;
}

/** The value of the button that was chosen, or "". */
export function chosen(title, choices) {
  return ask(title, h("div", { class: "choices" }, ...choices.map(([value, words]) => h("button", { value }, words))), h("div", { class: "row end" }, h("button", { value: "" }, "Cancel")));
}

const KEYS = [
  ["Enter", "send; Shift+Enter begins a new line"],
  ["Escape", "stop the answer, or close what is open"],
  ["Ctrl+K", "search conversations"],
  ["Alt+N", "new conversation"],
  ["Alt+A", "answer now: end the thought"],
  ["Alt+S", "settings"],
  ["Alt+I", "tokens and experts of the last answer"],
];

/** `keeps`: whether conversations are kept on the server. */
export function help(keeps) {
  const rows = KEYS.flatMap(([key, words]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, words)]);
  const where = keeps ? "New conversations are kept on this server, for your key alone. Export them to take them elsewhere." : "Conversations stay in this browser; the server keeps none. Export them to take them elsewhere.";
  return ask("Keys", h("dl", { class: "keys" }, ...rows), h("p", { class: "soft" }, where), h("div", { class: "row end" }, h("button", { value: "" }, "Close")));
}
