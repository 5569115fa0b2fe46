// The page's pure modules, in node. Run by test_modules.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { differences } from "./static/messages-view.js";
import { activeParams, balance, countExperts, decodeExperts, short, shareWords } from "./static/experts.js";
import { applyEvent, emptyAnswer, requestOf } from "./static/generate.js";
import { levelOf } from "./static/inspect-view.js";
import { readEvents } from "./static/sse.js";
import { serverStore } from "./static/store.js";
import { fromFile, toFile, toMarkdown } from "./static/transfer.js";
import * as tree from "./static/tree.js";

let count = 0;
const newId = () => `id${count++}`;

function conversation(...turns) {
  let made = tree.newConversation("c", 1);
  for (const [id, parent, role, content] of turns) made = tree.addNode(made, { id, parent, role, content }, made.updated + 1);
  return made;
}

const TURNS = [["q", null, "user", "what is 2 + 2?"], ["a", "q", "assistant", "4"], ["r", "a", "user", "sure?"], ["b", "r", "assistant", "yes"]];
const ids = (nodes) => nodes.map((node) => node.id).join("");

test("the selected path goes from the first message to the last", () => {
  assert.equal(ids(tree.selectedPath(conversation(...TURNS))), "qarb");
  assert.equal(ids(tree.selectedPath(conversation())), "");
});

test("an edited question is a branch, and the old one is still there", () => {
  const edited = conversation(...TURNS, ["e", null, "user", "what is 3 + 3?"], ["f", "e", "assistant", "6"]);
  assert.equal(ids(tree.selectedPath(edited)), "ef");
  assert.equal(ids(tree.siblingsOf(edited, "e")), "qe");
  const back = tree.selectNode(edited, "q");
  assert.equal(ids(tree.selectedPath(back)), "qarb");
  assert.equal(ids(tree.selectedPath(edited)), "ef", "the given conversation stays as it is");
});

test("selecting a message deep in another branch shows all of its path", () => {
  const many = conversation(...TURNS, ["e", null, "user", "x"], ["g", "q", "assistant", "four"]);
  assert.equal(ids(tree.selectedPath(many)), "e");
  assert.equal(ids(tree.selectedPath(tree.selectNode(many, "b"))), "qarb");
});

test("a message cannot follow one that is not there", () => {
  assert.throws(() => conversation(["q", "nobody", "user", ""]), /no message nobody/);
});

test("the model is sent the system prompt and the turns, without thoughts", () => {
  const thought = tree.changeNode(conversation(...TURNS), "a", { reasoning: "hm" });
  assert.deepEqual(tree.messagesFor(thought, "r", "be brief")[0], { role: "system", content: "be brief" });
  assert.deepEqual(tree.messagesFor(thought, "r", " ").map((each) => each.content), ["what is 2 + 2?", "4", "sure?"]);
  assert.ok(tree.messagesFor(thought, "r").every((each) => Object.keys(each).join() === "role,content"));
});

test("a question that failed is not sent again with the next one, unless its answer had begun", () => {
  const failed = tree.changeNode(conversation(...TURNS), "a", { state: "failed", error: "too long", content: "" });
  assert.deepEqual(tree.messagesFor(failed, "r", "").map((each) => each.content), ["sure?"]);
  assert.deepEqual(tree.messagesFor(failed, "q", "").map((each) => each.content), ["what is 2 + 2?"]);
  const begun = tree.changeNode(failed, "a", { content: "fo" });
  assert.deepEqual(tree.messagesFor(begun, "r", "").map((each) => each.content), ["what is 2 + 2?", "fo", "sure?"]);
});

test("what streamed before a reload is stopped after it", () => {
  const node = emptyAnswer("a", "q", tree.PLAIN_SETTINGS);
  const streaming = tree.addNode(conversation(TURNS[0]), node, 2);
  assert.equal(tree.settled(streaming).nodes.a.state, "stopped");
});

test("search finds conversations with all words, the latest first", () => {
  const one = { ...conversation(["q", null, "user", "red apples"]), id: "1", updated: 1 };
  const two = { ...conversation(["q", null, "user", "Red PEARS and apples"]), id: "2", updated: 2 };
  assert.deepEqual(tree.search([one, two], "apples red").map((each) => each.id), ["2", "1"]);
  assert.deepEqual(tree.search([one, two], "pears").map((each) => each.id), ["2"]);
  assert.equal(tree.search([one, two], "").length, 2);
});

test("the title is the first line of the first question, cut", () => {
  assert.equal(conversation(["q", null, "user", "\n  one\ntwo"]).title, "one");
  assert.equal(tree.titleOf("x".repeat(100)).length, 60);
});

test("settings that are null are not sent", () => {
  const made = conversation(...TURNS);
  assert.deepEqual(Object.keys(requestOf(made, "r", tree.PLAIN_SETTINGS)), ["messages"]);
  const body = requestOf(made, "r", { ...tree.PLAIN_SETTINGS, temperature: 0, thinking: false, budget: 5, active_experts: 2 });
  const { messages, ...rest } = body;
  assert.deepEqual(rest, { temperature: 0, active_experts: 2, enable_thinking: false, thinking_token_budget: 5 });
});

test("events of an answer make its node and its blocks", () => {
  const blocks = { thought: [], answer: [] };
  let node = emptyAnswer("a", "q", tree.PLAIN_SETTINGS);
  const data = { reasoning: "", content: "", tokens: 1, thought_tokens: 0, thought_seconds: null };
  const events = [
    { event: "start", data: { id: "r1", model: "m", prompt_tokens: 7 } },
    { event: "message", data: { ...data, content: "one\n\ntw", answer: { kept: 0, blocks: ["<p>one</p>", "<p>tw</p>"] } } },
    { event: "message", data: { ...data, content: "o", answer: { kept: 1, blocks: ["<p>two</p>"] } } },
    { event: "end", data: { ...data, tokens: 3, finish_reason: "stop", token_ids: [1, 2, 3], drafted: 2, accepted: 1 } },
  ];
  for (const event of events) node = { ...node, ...applyEvent(node, blocks, event) };
  assert.deepEqual(blocks, { thought: [], answer: ["<p>one</p>", "<p>two</p>"] });
  assert.equal(node.content, "one\n\ntwo");
  assert.deepEqual([node.state, node.request, node.prompt_tokens, node.tokens, node.token_ids], ["done", "r1", 7, 3, [1, 2, 3]]);
  assert.equal(applyEvent(node, blocks, { event: "error", data: { error: { message: "gone" } } }).error, "gone");
});

// Files -------------------------------------------------------------------------------------------------------------

test("a conversation that goes out and comes in again is the same but for its ids", () => {
  const node = { id: "d", parent: "r", role: "assistant", content: "five", reasoning: "hm", state: "done", token_ids: [5, 6], tokens: 2, rate: 3.5, settings: { ...tree.PLAIN_SETTINGS, temperature: 0.5 } };
  const made = tree.selectNode(tree.addNode(conversation(...TURNS), node, 9), "d");
  const [read] = fromFile(toFile([made]), newId);
  const texts = (each) => tree.selectedPath(each).map(({ content, role }) => [role, content]);
  assert.deepEqual(texts(read), texts(made));
  const { id, parent, ...back } = tree.selectedPath(read).at(-1);
  const { id: _, parent: __, ...own } = node;
  assert.deepEqual(back, own);
  assert.equal(Object.keys(read.nodes).length, 5);
  assert.ok(!Object.keys(read.nodes).some((each) => made.nodes[each]), "ids are new");
});

test("a file that is no export is refused with the reason, and nothing unknown of it is kept", () => {
  const made = JSON.parse(toFile([conversation(...TURNS)]));
  const broken = (change) => {
    const copy = structuredClone(made);
    change(copy.conversations[0], copy);
    return () => fromFile(JSON.stringify(copy), newId);
  };
  assert.throws(() => fromFile("{", newId), /no JSON/);
  assert.throws(() => fromFile("[]", newId), /no export/);
  assert.throws(() => fromFile("null", newId), /no export/);
  assert.throws(broken((_, file) => (file.version = 2)), /version 1/);
  assert.throws(broken((_, file) => (file.conversations = {})), /no list/);
  assert.throws(broken((_, file) => (file.conversations = [null])), /nodes: must be an object/);
  assert.throws(broken((each) => (each.title = 5)), /title: must be a text/);
  assert.throws(broken((each) => (each.nodes.q.role = "system")), /role/);
  assert.throws(broken((each) => (each.nodes.a.content = { html: "" })), /content of a message: must be a text/);
  assert.throws(broken((each) => (each.nodes.a.parent = "nobody")), /follows one that is not there/);
  assert.throws(broken((each) => (each.nodes.q.parent = "b")), /circle/);
  const [read] = broken((each) => Object.assign(each.nodes.a, { html: "<b>", token_ids: ["x"], tokens: "many", state: "streaming" }))();
  const node = tree.selectedPath(read)[1];
  assert.deepEqual([node.html, node.token_ids, node.tokens, node.state], [undefined, undefined, undefined, "done"]);
});

test("Markdown of a conversation has its selected branch", () => {
  const text = toMarkdown(tree.changeNode(conversation(...TURNS), "a", { reasoning: "one\ntwo" }));
  assert.match(text, /^# what is 2 \+ 2\?\n\n## You\n\nwhat is 2 \+ 2\?\n\n## Model\n\n> one\n> two\n\n4\n/);
});

// Streams -----------------------------------------------------------------------------------------------------------

test("events are the same however their bytes are cut", async () => {
  const text = ': keep-alive\n\nevent: start\ndata: {"a": "é𝛼"}\n\ndata: {"b": [1]}\n\ndata: {"cut": ';
  const bytes = new TextEncoder().encode(text);
  for (let size = 1; size <= bytes.length; size++) {
    const chunks = [];
    for (let at = 0; at < bytes.length; at += size) chunks.push(bytes.slice(at, at + size));
    const found = await Array.fromAsync(readEvents(chunks));
    assert.deepEqual(found, [{ event: "start", data: { a: "é𝛼" } }, { event: "message", data: { b: [1] } }], `pieces of ${size}`);
  }
});

// Experts -----------------------------------------------------------------------------------------------------------

const base64 = (numbers) => Buffer.from(Uint16Array.from(numbers).buffer).toString("base64");

test("experts are counted by layer for the tokens that are asked for", () => {
  // 3 tokens, 2 layers, 2 experts each of 4; 65535 is nobody
  const trace = decodeExperts(base64([0, 1, 2, 3, 0, 2, 2, 3, 0, 65535, 1, 3]), 3, 2);
  assert.equal(trace.topk, 2);
  assert.deepEqual([...countExperts(trace, 4, 0, 3)], [3, 1, 1, 0, 0, 1, 2, 3]);
  assert.deepEqual([...countExperts(trace, 4, 1, 2)], [1, 0, 1, 0, 0, 0, 1, 1]);
  assert.equal(decodeExperts("", 0, 2).topk, 0);
});

test("the balance of a layer is its busiest expert over the mean, less 1", () => {
  const [even, uneven, idle] = balance(Uint32Array.from([2, 2, 2, 2, 8, 0, 0, 0, 0, 0, 0, 0]), 3, 4);
  assert.deepEqual([even.maxVio, even.unused], [0, 0]);
  assert.deepEqual([uneven.maxVio, uneven.unused, uneven.busiest], [3, 3, 0]);
  assert.equal(idle.maxVio, 0);
});

test("active parameters follow the number of experts", () => {
  const model = { params: 671e9, active_params: 37e9, topk: 8, expert_params: 2.5e9 };
  assert.equal(activeParams(model, 8), 37e9);
  assert.equal(activeParams(model, 4), 27e9);
  assert.equal(shareWords(model, 8), "37B of 671B parameters (5.5 %)");
});

test("counts are short and keep their zeros", () => {
  assert.deepEqual([999, 100_000, 1_000_000, 651_648, 671_026_419_200, 1.5e12].map(short), ["999", "100K", "1M", "652K", "671B", "1.5T"]);
});

test("a token's shade follows its probability", () => {
  assert.deepEqual([1, 0.9, 0.89, 0.5, 0.1, 0.05, 0.001, 0].map((each) => levelOf(Math.log(each))), [0, 0, 1, 1, 2, 3, 4, 4]);
});

test("answers side by side say in what they differ", () => {
  const answer = (settings, model = "m") => ({ model, settings: { ...tree.PLAIN_SETTINGS, ...settings } });
  assert.equal(differences(answer({ temperature: 1 }), answer({})), "temperature 1");
  assert.equal(differences(answer({}), answer({ active_experts: 4 })), "experts by default");
  assert.equal(differences(answer({}, "one"), answer({}, "two")), "one");
  assert.equal(differences(answer({}), answer({})), "the same settings");
});

/** A server of a few lines: revisions as /page/conversations has them. */
function keeping(files = new Map()) {
  const refuse = (status) => Object.assign(new Error(`${status}`), { status });
  const pause = () => new Promise((resolve) => setTimeout(resolve, 1));
  let most = 0;
  let under = 0;
  return {
    files,
    most: () => most,
    list: async () => [...files.keys()].map((id) => ({ id })),
    read: async (id) => structuredClone(files.get(id) ?? (() => { throw refuse(404); })()),
    write: async (id, revision, conversation) => {
      most = Math.max(most, ++under);
      await pause();
      under--;
      const stands = files.get(id)?.revision ?? 0;
      if (stands !== revision) throw refuse(409);
      files.set(id, { revision: stands + 1, conversation: structuredClone(conversation) });
      return { revision: stands + 1 };
    },
    remove: async (id) => void files.delete(id),
  };
}

test("two tabs that write one conversation keep what both have written", async () => {
  const server = keeping();
  const [one, other] = [serverStore(server), serverStore(server)];
  const start = conversation(...TURNS.slice(0, 2));
  await one.put(start);
  await other.all();
  const [mine, theirs] = [["x", "a"], ["y", "a"]].map(([id, parent]) => tree.addNode(start, { id, parent, role: "user", content: id }, 9));
  const written = await Promise.all([one.put(mine), other.put(theirs)]);
  const kept = server.files.get("c").conversation;
  assert.deepEqual(Object.keys(kept.nodes).sort(), ["a", "q", "x", "y"]);
  assert.ok(written.some((each) => Object.keys(each.nodes).length === 4), "and one of them hears of it");
});

test("an answer that streams on does not overwrite what another tab has written meanwhile", async () => {
  const server = keeping();
  const [one, other] = [serverStore(server), serverStore(server)];
  const start = conversation(...TURNS.slice(0, 2));
  await one.put(start);
  await other.all();
  await other.put(tree.addNode(start, { id: "y", parent: "a", role: "user", content: "theirs" }, 9));
  const states = ["so", "so far", "so far so good"].map((content) => tree.changeNode(start, "a", { content }));
  const written = await Promise.all(states.map((each) => one.put(each)));
  const kept = server.files.get("c").conversation;
  assert.deepEqual([kept.nodes.a.content, kept.nodes.y.content], ["so far so good", "theirs"]);
  assert.deepEqual(Object.keys(written[0].nodes).sort(), ["a", "q", "y"]);
});

test("of one conversation a single writing is under way, and the last state is what is kept", async () => {
  const server = keeping();
  const store = serverStore(server);
  const states = Array.from({ length: 20 }, (_, at) => ({ ...conversation(...TURNS), title: `${at}` }));
  await Promise.all(states.map((each) => store.put(each)));
  assert.equal(server.most(), 1);
  assert.equal(server.files.get("c").conversation.title, "19");
  assert.ok(server.files.get("c").revision <= 3);
});

test("what another tab has deleted is kept again where this one still writes it", async () => {
  const server = keeping();
  const store = serverStore(server);
  await store.put(conversation(...TURNS));
  server.files.delete("c");
  await store.put(conversation(...TURNS));
  assert.equal(server.files.get("c").revision, 1);
  await store.remove("c");
  await store.remove("c");
  assert.deepEqual(await store.all(), []);
});

test("a server that keeps nothing is an error for whoever writes, and the next writing is tried", async () => {
  const server = keeping();
  const write = server.write;
  server.write = async () => { throw Object.assign(new Error("full"), { status: 507 }); };
  const store = serverStore(server);
  await assert.rejects(store.put(conversation(...TURNS)), /full/);
  server.write = write;
  await store.put(conversation(...TURNS));
  assert.equal(server.files.size, 1);
});

test("an answer that has ended in another tab is not overwritten by one that streams", () => {
  const ended = tree.addNode(conversation(...TURNS), { id: "z", parent: "b", role: "assistant", content: "all of it", state: "done" }, 9);
  const streaming = tree.changeNode(ended, "z", { content: "all", state: "streaming" });
  assert.equal(tree.mergeConversations(streaming, ended).nodes.z.content, "all of it");
  assert.equal(tree.mergeConversations(ended, streaming).nodes.z.content, "all of it");
});
