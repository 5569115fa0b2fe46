// Where conversations are kept: in this browser's IndexedDB, and on a server that keeps them.

import { mergeConversations } from "./tree.js";

const NAME = "kogia";
const TABLE = "conversations";
const AT_ONCE = 8; // conversations that are read from the server side by side

export async function openStore() {
  const database = await new Promise((resolve, reject) => {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(TABLE, { keyPath: "id" });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  const run = (mode, work) =>
    new Promise((resolve, reject) => {
      const transaction = database.transaction(TABLE, mode);
      const request = work(transaction.objectStore(TABLE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  return {
    all: () => run("readonly", (table) => table.getAll()),
    put: (conversation) => run("readwrite", (table) => table.put(conversation)),
    remove: (id) => run("readwrite", (table) => table.delete(id)),
  };
}

/** Where a browser keeps nothing (private windows, no space): conversations last as long as the page. */
export function forgetfulStore() {
  return { all: async () => [], put: async () => {}, remove: async () => {} };
}

/**
 * The store of a server, through `kept` of api.js. Of each conversation one writing is under way, and the latest waits: an answer
 * that streams is written as fast as the server takes it. What another tab has written meanwhile is read, and both are put together.
 */
export function serverStore(kept) {
  const revisions = new Map();
  const others = new Map(); // id -> what another tab has written, until the page has it
  const waiting = new Map(); // id -> the latest conversation, and the promise of its writing
  const read = async (id) => {
    const { revision, conversation } = await kept.read(id);
    revisions.set(id, revision);
    return conversation;
  };
  const absent = (error) => {
    if (error.status !== 404) throw error;
    return null;
  };

  /** The conversation, with what another tab has added to it. */
  function whole(conversation) {
    const other = others.get(conversation.id);
    if (!other) return conversation;
    if (Object.keys(other.nodes).every((id) => conversation.nodes[id])) others.delete(conversation.id);
    return mergeConversations(conversation, other);
  }

  /** Writes a conversation; gives what was written. */
  async function write(conversation, tries = 5) {
    const { id } = conversation;
    const asked = whole(conversation);
    try {
      const { revision } = await kept.write(id, revisions.get(id) ?? 0, asked);
      revisions.set(id, revision);
      return asked;
    } catch (error) {
      if (error.status !== 409 || tries === 0) throw error;
    }
    const other = await read(id).catch(absent);
    if (other) others.set(id, other);
    else revisions.delete(id); // deleted in another tab: what is still written in this one is kept
    return write(conversation, tries - 1);
  }

  function put(conversation) {
    const { id } = conversation;
    const entry = waiting.get(id);
    if (entry) {
      entry.next = conversation;
      return entry.done;
    }
    const own = { next: null, done: null };
    waiting.set(id, own);
    own.done = (async () => {
      let written = conversation;
      try {
        for (written = await write(conversation); own.next; ) {
          const next = own.next;
          own.next = null;
          written = await write(next);
        }
      } finally {
        waiting.delete(id);
      }
      return written;
    })();
    return own.done;
  }

  async function all() {
    const ids = (await kept.list()).map((each) => each.id);
    const found = [];
    const next = async () => {
      for (let id = ids.shift(); id !== undefined; id = ids.shift()) {
        const conversation = await read(id).catch(absent);
        if (conversation) found.push(conversation);
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, next));
    return found;
  }

  async function remove(id) {
    await waiting.get(id)?.done.catch(() => {});
    revisions.delete(id);
    await kept.remove(id).catch(absent);
  }
  return { all, put, remove };
}
