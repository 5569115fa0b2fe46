// The list of conversations, its search, and what comes in and goes out as files.

import { button, h } from "./html.js";
import { search } from "./tree.js";

/** `actions` are {create, open, remove, importFile, exportAll, help}. Gives a function that draws the list again. */
export function sidebar(element, actions) {
  const list = h("ul", { class: "conversations" });
  const query = h("input", { type: "search", id: "search", placeholder: "Search", "aria-label": "Search conversations" });
  const file = h("input", { type: "file", accept: "application/json,.json", hidden: true });
  let drawAgain = () => {};
  query.addEventListener("input", () => drawAgain());
  file.addEventListener("change", () => {
    if (file.files[0]) actions.importFile(file.files[0]);
    file.value = "";
  });
  element.replaceChildren(
    h("div", { class: "row" }, h("strong", { class: "brand" }, "kogia"), h("span", { class: "space" }), button("New conversation", "add", actions.create, { words: "New" })),
    query,
    list,
    h(
      "div",
      { class: "row foot" },
      button("Import conversations from a file", "open", () => file.click(), { words: "Import" }),
      button("Export all conversations to a file", "save", actions.exportAll, { words: "Export" }),
      h("span", { class: "space" }),
      button("Keys and help", "help", actions.help),
    ),
    file,
  );
  return (conversations, current) => {
    drawAgain = () => {
      const found = search(conversations, query.value);
      const items = found.map((each) => item(each, each.id === current, actions));
      list.replaceChildren(...(items.length ? items : [h("li", { class: "soft" }, query.value ? "Nothing found" : "No conversations yet")]));
    };
    drawAgain();
  };
}

function item(conversation, isCurrent, actions) {
  return h(
    "li",
    {},
    h(
      "button",
      { type: "button", class: "title", "aria-current": isCurrent ? "true" : null, onclick: () => actions.open(conversation.id) },
      h("span", {}, conversation.title || "New conversation"),
      h("small", {}, dateOf(conversation.updated)),
    ),
    button(`Delete ${conversation.title || "conversation"}`, "remove", () => actions.remove(conversation), { class: "quiet" }),
  );
}

function dateOf(time) {
  const date = new Date(time);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : date.toLocaleDateString([], { day: "numeric", month: "short" });
}
