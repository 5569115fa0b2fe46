// A conversation as a tree: an edited question or a second answer is another child of the same parent, and nothing is lost.
// Pure: every function returns a new conversation and leaves the given one as it is.

export const ROOT = "root";

/** Settings of a new conversation; null leaves a value to the server. */
export const PLAIN_SETTINGS = Object.freeze({
  model: null,
  system: "",
  thinking: null,
  budget: null,
  temperature: null,
  top_p: null,
  max_tokens: null,
  active_experts: null,
  seed: null,
});

export function newConversation(id, now, settings = PLAIN_SETTINGS) {
  return { id, title: "", created: now, updated: now, settings: { ...settings }, other: null, nodes: {}, selected: {}, pairs: {} };
}

/** Adds a node {id, parent, role, content, ...} below its parent (null: at the beginning), and selects it. */
export function addNode(conversation, node, now) {
  const parent = node.parent ?? ROOT;
  if (parent !== ROOT && !conversation.nodes[parent]) throw new Error(`no message ${parent} to put a message under`);
  const next = {
    ...conversation,
    updated: now,
    nodes: { ...conversation.nodes, [node.id]: { ...node, parent } },
    selected: { ...conversation.selected, [parent]: node.id },
  };
  return next.title || node.role !== "user" ? next : { ...next, title: titleOf(node.content) };
}

export function changeNode(conversation, id, change) {
  const node = conversation.nodes[id];
  if (!node) return conversation;
  return { ...conversation, nodes: { ...conversation.nodes, [id]: { ...node, ...change } } };
}

/** Children of one parent in the order in which they were added. */
export function childrenOf(conversation, parent) {
  return Object.values(conversation.nodes).filter((node) => node.parent === (parent ?? ROOT));
}

export function siblingsOf(conversation, id) {
  return childrenOf(conversation, conversation.nodes[id].parent);
}

/** The nodes from the first message to the end of the selected branches. */
export function selectedPath(conversation) {
  const path = [];
  for (let parent = ROOT; ; parent = path.at(-1).id) {
    const children = childrenOf(conversation, parent);
    if (!children.length) return path;
    path.push(children.find((node) => node.id === conversation.selected[parent]) ?? children.at(-1));
  }
}

/** The nodes from the first message to this one. */
export function pathTo(conversation, id) {
  const path = [];
  for (let node = conversation.nodes[id]; node; node = conversation.nodes[node.parent]) path.unshift(node);
  return path;
}

/** Shows the branch that a node is on. */
export function selectNode(conversation, id) {
  const selected = { ...conversation.selected };
  for (const node of pathTo(conversation, id)) selected[node.parent] = node.id;
  return { ...conversation, selected };
}

/** Two answers to one message that are shown side by side; null shows one again. */
export function pairNodes(conversation, parent, pair) {
  const pairs = { ...conversation.pairs };
  if (pair) pairs[parent] = pair;
  else delete pairs[parent];
  return { ...conversation, pairs };
}

/** What the API is sent to answer the message `id`. Thoughts are not: a model does not read its old ones. Nor is a question that
 * failed, with its answer that has no text: one that is too long would be so again, whatever is asked after it. */
export function messagesFor(conversation, id, system = conversation.settings.system) {
  const path = pathTo(conversation, id);
  const failed = (node) => node?.role === "assistant" && node.state === "failed" && !node.content;
  const read = path.filter((node, index) => !failed(node) && !failed(path[index + 1]));
  const turns = read.map(({ role, content }) => ({ role, content }));
  return system.trim() ? [{ role: "system", content: system }, ...turns] : turns;
}

/** One conversation as two tabs have it: all messages of both. Where they differ, mine counts, but for an answer that has ended
 * in the other while it still streams in mine. */
export function mergeConversations(mine, other) {
  const nodes = { ...other.nodes };
  for (const [id, node] of Object.entries(mine.nodes)) {
    if (!(node.state === "streaming" && nodes[id] && nodes[id].state !== "streaming")) nodes[id] = node;
  }
  const later = mine.updated >= other.updated ? mine : other;
  return {
    ...other,
    ...mine,
    title: later.title || mine.title || other.title,
    updated: later.updated,
    nodes,
    selected: { ...other.selected, ...mine.selected },
    pairs: { ...other.pairs, ...mine.pairs },
  };
}

/** After a reload nothing streams any more. */
export function settled(conversation) {
  const nodes = Object.fromEntries(
    Object.entries(conversation.nodes).map(([id, node]) => [id, node.state === "streaming" ? { ...node, state: "stopped" } : node]),
  );
  return { ...conversation, nodes };
}

/** Conversations that hold all words, in title or messages, the latest first. */
export function search(conversations, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return conversations
    .filter((each) => {
      const text = [each.title, ...Object.values(each.nodes).map((node) => node.content)].join("\n").toLowerCase();
      return words.every((word) => text.includes(word));
    })
    .sort((one, other) => other.updated - one.updated);
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].trim();
  return line.length <= 60 ? line : `${line.slice(0, 59)}…`;
}
