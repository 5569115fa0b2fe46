// What the page asks of the server that it came from.

import { chunksOf, readEvents } from "./sse.js";

const KEY = "kogia-key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The key that opens a server with keys. It lasts as long as the tab. */
export function rememberKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

async function ask(path, body, signal, method = body === undefined ? "GET" : "POST") {
  const key = sessionStorage.getItem(KEY);
  const response = await fetch(path, {
    method,
    headers: { ...(body === undefined ? {} : { "content-type": "application/json" }), ...(key ? { authorization: `Bearer ${key}` } : {}) },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    credentials: "omit",
  });
  if (response.ok) return response;
  const words = await response.json().then((answer) => answer.error?.message, () => null);
  throw new ApiError(words ?? `the server answered ${response.status}`, response.status);
}

const json = async (...args) => (await ask(...args)).json();

/** {models, keeps}: the models that are served, with what the page shows of each, and whether the server keeps conversations. */
export const models = () => json("/page/models");

const keptPath = (id) => `/page/conversations/${encodeURIComponent(id)}`;

/** The conversations that the server keeps. */
export const kept = {
  list: async () => (await json("/page/conversations")).conversations,
  read: (id) => json(keptPath(id)),
  write: (id, revision, conversation) => json(keptPath(id), { revision, conversation }),
  remove: (id) => json(keptPath(id), undefined, undefined, "DELETE"),
};

/** Blocks of HTML of each text. */
export const render = async (texts) => (await json("/page/render", { texts })).blocks;

/** Tokens of an answer with their probabilities and experts. */
export const trace = (body, signal) => json("/page/trace", body, signal);

/** Events of an answer while it is written. */
export async function* chat(body, signal) {
  const response = await ask("/page/chat", body, signal);
  yield* readEvents(chunksOf(response.body));
}

/** Ends the thought of an answer that is being written. One that has just ended needs none. */
export async function stopThinking(id) {
  try {
    await ask(`/v1/chat/completions/${encodeURIComponent(id)}/stop_thinking`, {});
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}
