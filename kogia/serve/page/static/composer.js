// Where a question is written, with what is left of the context and how fast the answer comes.

import { button, formatted, h } from "./html.js";

/** `actions` are {ask(text) -> whether it was sent, stop}. Gives {update, focus, set}. */
export function composer(form, actions) {
  const area = h("textarea", { id: "question", rows: 1, placeholder: "Ask something", "aria-label": "Your message", autofocus: true, enterkeyhint: "send" });
  const send = button("Send", "send", null, { type: "submit", class: "send" });
  const stop = button("Stop", "stop", actions.stop, { class: "send", hidden: true });
  const gauge = h("meter", { min: 0, max: 1, value: 0, "aria-label": "Context in use" });
  const context = h("span", {});
  const speed = h("span", {});
  const fit = () => {
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight, 240)}px`;
    send.disabled = !area.value.trim();
  };
  const submit = () => {
    if (area.value.trim() && stop.hidden && actions.ask(area.value)) area.value = "";
    fit();
  };
  area.addEventListener("input", fit);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  form.replaceChildren(h("div", { class: "box" }, area, send, stop), h("div", { class: "facts" }, gauge, context, h("span", { class: "space" }), speed));
  fit();
  return {
    focus: () => area.focus(),
    set: (text) => {
      area.value = text;
      fit();
    },
    /** `used` and `length` in tokens; `words` is the line at the right. */
    update: ({ isRunning, used, length, words }) => {
      stop.hidden = !isRunning;
      send.hidden = isRunning;
      gauge.value = length ? used / length : 0;
      gauge.hidden = !length;
      context.textContent = length ? `${formatted(used)} of ${formatted(length)} tokens` : "";
      speed.textContent = words;
    },
  };
}
