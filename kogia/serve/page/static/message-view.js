// A message as an element that follows its node.

import { button, formatted, h, rendered } from "./html.js";

/** A message of the user: what was written, as it was written. `actions` are {edit, branch}. */
export function questionView(node, siblings, actions) {
  const text = h("div", { class: "question-text", dir: "auto" }, node.content);
  const edit = () => view.replaceChildren(editor(node, () => view.replaceChildren(text, bar), actions));
  const bar = h(
    "div",
    { class: "actions" },
    branches(node, siblings, actions),
    copyButton(() => node.content),
    button("Edit", "edit", edit),
  );
  const view = h("article", { class: "question", "aria-label": "You", "data-id": node.id }, text, bar);
  return { element: view, update: () => {} };
}

function editor(node, leave, actions) {
  const area = h("textarea", { "aria-label": "Edit the message", rows: Math.min(12, node.content.split("\n").length + 1) });
  area.value = node.content;
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      actions.edit(node, area.value);
    }
  });
  setTimeout(() => area.focus());
  return h(
    "form",
    {
      class: "editor",
      onsubmit: (event) => {
        event.preventDefault();
        actions.edit(node, area.value);
      },
    },
    area,
    h("div", { class: "row end" }, h("button", { type: "button", onclick: leave }, "Cancel"), h("button", { class: "strong" }, "Ask again")),
  );
}

/** An answer. `blocks` is {thought, answer}, lists of HTML, or null while they are not known. */
export function answerView(node, siblings, actions, { caption = null, isOther = false } = {}) {
  const thought = thoughtView(node, actions);
  const text = h("div", { class: "prose", dir: "auto" });
  const error = h("p", { class: "notice", role: "alert", hidden: true });
  const bar = h("div", { class: "actions" });
  const shownText = blockList(text);
  const view = h(
    "article",
    { class: isOther ? "answer other" : "answer", "aria-label": "Answer", "data-id": node.id },
    caption ? h("p", { class: "caption" }, caption) : null,
    thought.element,
    text,
    error,
    bar,
  );
  const update = (current, blocks) => {
    const streams = current.state === "streaming";
    view.setAttribute("aria-busy", streams);
    view.classList.toggle("waiting", streams && !current.content && !current.reasoning);
    thought.update(current, blocks);
    shownText(blocks?.answer, current.content);
    error.hidden = !current.error && current.finish_reason !== "length";
    error.textContent = current.error ?? "The answer ended at its longest length.";
    error.classList.toggle("mild", !current.error);
    bar.replaceChildren(...(streams ? [] : answerBar(current, siblings, actions, { isOther, isPaired: Boolean(caption) })));
  };
  return { element: view, update };
}

function answerBar(node, siblings, actions, { isOther, isPaired }) {
  return [
    isOther ? h("button", { type: "button", class: "strong", onclick: () => actions.choose(node) }, "Continue with this one") : null,
    isPaired ? null : branches(node, siblings, actions),
    copyButton(() => node.content),
    button("Answer again", "again", () => actions.again(node)),
    siblings.length > 1 ? button(isPaired ? "One answer at a time" : "Side by side with another answer", "pair", () => actions.pair(node)) : null,
    node.token_ids ? button("Tokens and experts", "experts", () => actions.inspect(node), { class: "inspect" }) : null,
    h("span", { class: "stats" }, statsOf(node)),
  ].filter(Boolean);
}

/** "142 tokens · 61 tokens/s · drafts 78 % accepted" */
export function statsOf(node) {
  const parts = [];
  if (node.tokens) parts.push(`${formatted(node.tokens)} tokens`);
  if (node.rate) parts.push(`${node.rate < 10 ? node.rate.toFixed(1) : formatted(node.rate)} tokens/s`);
  if (node.drafted) parts.push(`drafts ${Math.round((100 * node.accepted) / node.drafted)} % accepted`);
  if (node.state === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

function thoughtView(node, actions) {
  const title = h("span", { class: "thought-title" });
  const count = h("span", { class: "count" });
  const preview = h("span", { class: "preview", "aria-hidden": "true" });
  const text = h("div", { class: "prose", dir: "auto" });
  const details = h("details", { class: "thought" }, h("summary", {}, title, count, preview), text);
  const now = h("button", { type: "button", class: "now", onclick: () => actions.answerNow(node.id) }, "Answer now");
  const element = h("div", { class: "thinking", hidden: true }, details, now);
  const show = blockList(text);
  const update = (current, blocks) => {
    const thinks = current.state === "streaming" && !current.content && Boolean(current.reasoning);
    element.hidden = !current.reasoning;
    element.classList.toggle("live", thinks);
    now.hidden = !thinks;
    title.textContent = thinks ? "Thinking" : "Thought";
    count.textContent = thoughtLength(current);
    preview.textContent = thinks ? current.reasoning.slice(-120).trim().split("\n").at(-1) : "";
    show(blocks?.thought, current.reasoning);
  };
  return { element, update };
}

function thoughtLength(node) {
  const tokens = node.thought_tokens ? `${formatted(node.thought_tokens)} tokens` : "";
  const seconds = node.thought_seconds ? `${node.thought_seconds.toFixed(1)} s` : "";
  return [tokens, seconds].filter(Boolean).join(", ");
}

/** A function that brings an element's blocks up to date, changing only those that differ; plain text until they are known. */
function blockList(element) {
  let shown = [];
  let nodes = [];
  return (blocks, text) => {
    element.classList.toggle("plain", !blocks);
    if (!blocks) {
      if (element.textContent !== text) element.textContent = text;
      return;
    }
    if (!shown.length) element.replaceChildren();
    let same = 0;
    while (same < shown.length && shown[same] === blocks[same]) same++;
    for (const each of nodes.splice(same).flat()) each.remove();
    for (const html of blocks.slice(same)) {
      const fragment = rendered(html);
      for (const code of fragment.querySelectorAll("pre[data-language]")) code.append(copyButton(() => code.querySelector("code").textContent));
      nodes.push([...fragment.childNodes]);
      element.append(fragment);
    }
    shown = [...blocks];
  };
}

function branches(node, siblings, actions) {
  if (siblings.length < 2) return null;
  const at = siblings.findIndex((each) => each.id === node.id);
  const to = (step) => actions.branch(siblings[at + step]);
  return h(
    "span",
    { class: "branches", role: "group", "aria-label": "Versions" },
    button("Previous version", "left", () => to(-1), { disabled: at === 0 }),
    h("span", {}, `${at + 1} / ${siblings.length}`),
    button("Next version", "right", () => to(1), { disabled: at === siblings.length - 1 }),
  );
}

/** (The clipboard is only there over HTTPS or on one's own machine; the old way is everywhere.) */
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

function copyButton(textOf) {
  const copy = button("Copy", "copy", async () => {
    await copyText(textOf());
    copy.classList.add("done");
    setTimeout(() => copy.classList.remove("done"), 1200);
  });
  copy.classList.add("copy");
  return copy;
}
