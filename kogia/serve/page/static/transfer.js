// Conversations as files. What is read is checked field by field: a file may come from anybody.

import { PLAIN_SETTINGS, ROOT, newConversation, selectedPath } from "./tree.js";

export const FORMAT = "kogia-conversations";
const MOST_NODES = 20_000;

export function toFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of a file, with new ids from `newId`. Throws an Error that says what is wrong. */
export function fromFile(text, newId) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("the file is no JSON");
  }
  if (file?.format !== FORMAT || file.version !== 1) throw new Error(`the file is no export of conversations (${FORMAT}, version 1)`);
  if (!Array.isArray(file.conversations)) throw new Error("the file holds no list of conversations");
  return file.conversations.map((each, index) => readConversation(each, `conversation ${index + 1}`, newId));
}

/** The selected branch as Markdown. */
export function toMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  for (const node of selectedPath(conversation)) {
    parts.push(`## ${node.role === "user" ? "You" : node.model || "Model"}`);
    if (node.reasoning) parts.push(node.reasoning.trim().split("\n").map((line) => `> ${line}`).join("\n"));
    parts.push(node.content.trim());
  }
  return `${parts.join("\n\n")}\n`;
}

function readConversation(value, name, newId) {
  const nodes = Object.values(object(value?.nodes, `${name}: nodes`));
  if (nodes.length > MOST_NODES) throw new Error(`${name}: more than ${MOST_NODES} messages`);
  const ids = new Map(nodes.map((node) => [string(node?.id, `${name}: id of a message`), newId()]));
  const read = newConversation(newId(), number(value.created, `${name}: created`), readSettings(value.settings, name));
  read.updated = number(value.updated, `${name}: updated`);
  read.title = string(value.title, `${name}: title`).slice(0, 200);
  for (const node of nodes) {
    const parent = node.parent === ROOT ? ROOT : ids.get(node.parent);
    if (!parent) throw new Error(`${name}: a message follows one that is not there`);
    read.nodes[ids.get(node.id)] = readNode(node, ids.get(node.id), parent, name);
  }
  for (const node of Object.values(read.nodes)) checkRooted(read, node, name);
  for (const [parent, child] of Object.entries(object(value.selected ?? {}, `${name}: selected`))) {
    const from = parent === ROOT ? ROOT : ids.get(parent);
    if (from && read.nodes[ids.get(child)]?.parent === from) read.selected[from] = ids.get(child);
  }
  return read;
}

function readNode(node, id, parent, name) {
  if (!["user", "assistant"].includes(node.role)) throw new Error(`${name}: role ${JSON.stringify(node.role)}; must be user or assistant`);
  const read = { id, parent, role: node.role, content: string(node.content, `${name}: content of a message`) };
  if (node.role === "user") return read;
  read.state = node.state === "failed" ? "failed" : "done";
  for (const key of ["reasoning", "model", "finish_reason"]) if (typeof node[key] === "string") read[key] = node[key];
  for (const key of ["tokens", "thought_tokens", "thought_seconds", "prompt_tokens", "seconds", "rate", "drafted", "accepted"])
    if (Number.isFinite(node[key])) read[key] = node[key];
  if (Array.isArray(node.token_ids) && node.token_ids.every((each) => Number.isInteger(each) && each >= 0)) read.token_ids = node.token_ids;
  read.settings = readSettings(node.settings, name);
  return read;
}

function checkRooted(conversation, node, name) {
  const seen = new Set();
  for (let each = node; each; each = conversation.nodes[each.parent]) {
    if (seen.has(each.id)) throw new Error(`${name}: messages follow each other in a circle`);
    seen.add(each.id);
  }
}

function readSettings(value, name) {
  const given = object(value ?? {}, `${name}: settings`);
  const known = Object.entries(PLAIN_SETTINGS).map(([key, plain]) => {
    const kinds = { model: "string", system: "string", thinking: "boolean" };
    const fits = typeof given[key] === (kinds[key] ?? "number") && (typeof given[key] !== "number" || Number.isFinite(given[key]));
    return [key, fits ? given[key] : plain];
  });
  return Object.fromEntries(known);
}

function object(value, name) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error(`${name}: must be an object`);
  return value;
}

function string(value, name) {
  if (typeof value !== "string") throw new Error(`${name}: must be a text`);
  return value;
}

function number(value, name) {
  if (!Number.isFinite(value)) throw new Error(`${name}: must be a number`);
  return value;
}
