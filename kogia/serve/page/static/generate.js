// One answer on its way: what the server's events do to its node, and how it is ended.

import * as api from "./api.js";
import { messagesFor } from "./tree.js";

/** The fields of a request that a conversation's settings make. */
export function requestOf(conversation, parent, settings) {
  const body = { messages: messagesFor(conversation, parent, settings.system) };
  for (const name of ["model", "temperature", "top_p", "max_tokens", "active_experts", "seed"]) {
    if (settings[name] !== null) body[name] = settings[name];
  }
  if (settings.thinking !== null) body.enable_thinking = settings.thinking;
  if (settings.budget !== null) body.thinking_token_budget = settings.budget;
  return body;
}

/** A node before its first token. */
export function emptyAnswer(id, parent, settings) {
  return { id, parent, role: "assistant", content: "", reasoning: "", state: "streaming", settings, tokens: 0, thought_tokens: 0 };
}

/** What one event changes of a node. `blocks` are {thought, answer}, lists of HTML, and change in place. */
export function applyEvent(node, blocks, { event, data }) {
  if (event === "start") return { request: data.id, model: data.model, prompt_tokens: data.prompt_tokens };
  if (event === "error") return { state: "failed", error: data.error.message };
  for (const part of ["thought", "answer"]) {
    if (data[part]) blocks[part].splice(data[part].kept, Infinity, ...data[part].blocks);
  }
  const change = { tokens: data.tokens, thought_tokens: data.thought_tokens, seconds: data.seconds, rate: data.rate };
  if (data.reasoning) change.reasoning = node.reasoning + data.reasoning;
  if (data.content) change.content = node.content + data.content;
  if (data.thought_seconds !== null) change.thought_seconds = data.thought_seconds;
  if (event !== "end") return change;
  const { finish_reason, token_ids, drafted, accepted } = data;
  return { ...change, state: "done", finish_reason, token_ids, drafted, accepted };
}

/** Streams an answer; `update` is told of each change. Ends when it is done, stopped by `signal`, or failed. */
export async function generate(body, node, blocks, signal, update) {
  let current = node;
  const tell = (change) => {
    current = { ...current, ...change };
    update(change);
  };
  try {
    for await (const event of api.chat(body, signal)) tell(applyEvent(current, blocks, event));
    if (current.state === "streaming") tell({ state: "failed", error: "the server ended the answer early" });
  } catch (error) {
    if (signal.aborted) tell({ state: "stopped" });
    else tell({ state: "failed", error: wordsFor(error), status: error.status });
  }
}

function wordsFor(error) {
  return error instanceof api.ApiError ? error.message : "The connection to the server was lost.";
}
