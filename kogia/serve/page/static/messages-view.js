// The messages of the selected branch. Elements stay as long as their message is shown.

import * as api from "./api.js";
import { h } from "./html.js";
import { answerView, questionView } from "./message-view.js";
import { PLAIN_SETTINGS, selectedPath, siblingsOf } from "./tree.js";

const MOST_AT_ONCE = 50;

export class MessagesView {
  constructor(element, actions) {
    this.element = element;
    this.actions = actions;
    this.blocks = new Map(); // id -> {thought, answer}: blocks of HTML that the server has rendered
    this.views = new Map();
    this.drawn = "";
  }

  /** Shows a conversation; `greeting` where it has no messages. */
  show(conversation, greeting) {
    this.conversation = conversation;
    const path = selectedPath(conversation);
    const rows = path.map((node) => this.pairOf(node) ?? [node]);
    const drawn = JSON.stringify([conversation.id, rows.map((row) => row.map((node) => [node.id, siblingsOf(conversation, node.id).length]))]);
    if (drawn !== this.drawn || !rows.length) {
      this.drawn = drawn;
      this.views.clear();
      this.element.replaceChildren(...(rows.length ? rows.map((row, at) => this.row(row, path[at])) : [greeting()]));
    }
    for (const node of rows.flat()) this.update(node);
    this.fetchBlocks(rows.flat());
  }

  /** Brings the element of one node up to date, if it is shown. */
  update(node) {
    this.keepingBottom(() => this.views.get(node.id)?.update(node, this.blocks.get(node.id)));
  }

  /** Blocks of an answer that begins to stream. */
  begin(id) {
    const blocks = { thought: [], answer: [] };
    this.blocks.set(id, blocks);
    return blocks;
  }

  toBottom() {
    this.element.scrollTop = this.element.scrollHeight;
  }

  keepingBottom(change) {
    const { scrollTop, scrollHeight, clientHeight } = this.element;
    const atBottom = scrollHeight - scrollTop - clientHeight < 48;
    change();
    if (atBottom) this.toBottom();
  }

  pairOf(node) {
    const pair = this.conversation.pairs[node.parent];
    const nodes = pair?.map((id) => this.conversation.nodes[id]).filter(Boolean);
    return nodes?.length === 2 && pair.includes(node.id) ? nodes : null;
  }

  row(nodes, selected) {
    const elements = nodes.map((node) => this.view(node, nodes, selected));
    return nodes.length === 1 ? elements[0] : h("div", { class: "pair", role: "group", "aria-label": "Two answers side by side" }, ...elements);
  }

  view(node, row, selected) {
    const siblings = siblingsOf(this.conversation, node.id);
    const options = row.length === 1 ? {} : { caption: differences(node, row.find((each) => each !== node)), isOther: node !== selected };
    const view = (node.role === "user" ? questionView : answerView)(node, siblings, this.actions, options);
    this.views.set(node.id, view);
    return view.element;
  }

  async fetchBlocks(nodes) {
    const wanted = nodes.filter((node) => node.role === "assistant" && node.state !== "streaming" && !this.blocks.has(node.id));
    for (let at = 0; at < wanted.length; at += MOST_AT_ONCE) {
      const some = wanted.slice(at, at + MOST_AT_ONCE);
      for (const node of some) this.blocks.set(node.id, null);
      try {
        const blocks = await api.render(some.flatMap((node) => [node.reasoning ?? "", node.content]));
        some.forEach((node, index) => this.blocks.set(node.id, { thought: blocks[2 * index], answer: blocks[2 * index + 1] }));
      } catch {
        for (const node of some) this.blocks.delete(node.id); // plain text stays; the next showing tries again
      }
      for (const node of some) this.update(node);
    }
  }
}

const NAMES = { model: "", temperature: "temperature", top_p: "top p", active_experts: "experts", budget: "thought of at most", thinking: "thinking", max_tokens: "answer of at most", seed: "seed", system: "system prompt" };

/** In what the settings of an answer differ from those of the one beside it. */
export function differences(node, other) {
  const [own, others] = [node, other].map((each) => ({ ...PLAIN_SETTINGS, ...each.settings, model: each.model ?? each.settings?.model ?? null }));
  const words = Object.entries(NAMES).filter(([name]) => own[name] !== others[name]).map(([name, word]) => `${word} ${wordsFor(own[name])}`.trim());
  return words.join(", ") || "the same settings";
}

function wordsFor(value) {
  if (value === null) return "by default";
  if (typeof value === "boolean") return value ? "on" : "off";
  return typeof value === "string" && value.length > 40 ? `${value.slice(0, 39)}…` : String(value);
}
