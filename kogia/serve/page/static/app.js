// The page: its state, and what its parts do to it.

import * as api from "./api.js";
import { composer } from "./composer.js";
import { chosen, confirmed, entered, help } from "./dialogs.js";
import { short } from "./experts.js";
import { emptyAnswer, generate, requestOf } from "./generate.js";
import { announce, button, formatted, h } from "./html.js";
import { inspectView } from "./inspect-view.js";
import { MessagesView } from "./messages-view.js";
import { settingsView } from "./settings-view.js";
import { sidebar } from "./sidebar.js";
import { forgetfulStore, openStore, serverStore } from "./store.js";
import { fromFile, toFile, toMarkdown } from "./transfer.js";
import { PLAIN_SETTINGS, addNode, changeNode, mergeConversations, newConversation, pairNodes, selectNode, selectedPath, settled, siblingsOf, titleOf } from "./tree.js";

const SAVE_PAUSE = 500; // ms between two savings of an answer that streams
const element = (id) => document.getElementById(id);

/** (`crypto.randomUUID` is only there over HTTPS or on one's own machine.) */
const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (each) => each.toString(16).padStart(8, "0")).join("");

class App {
  async start() {
    this.conversations = new Map();
    this.models = [];
    this.running = new Map(); // id of an answer -> AbortController
    this.inBrowser = new Set(); // ids of conversations that stay in this browser
    this.saved = new Map(); // id of a conversation -> time
    this.panel = null;
    this.messages = new MessagesView(element("messages"), {
      edit: (node, text) => this.edit(node, text),
      branch: (node) => this.change(selectNode(this.current, node.id)),
      choose: (node) => this.change(pairNodes(selectNode(this.current, node.id), node.parent, null)),
      again: (node) => this.answer(node.parent, [this.current.settings]),
      pair: (node) => this.pair(node),
      inspect: (node) => this.inspect(node),
      answerNow: (id) => this.answerNow(id),
    });
    this.composer = composer(element("composer"), { ask: (text) => this.ask(text), stop: () => this.stop() });
    this.drawList = sidebar(element("sidebar"), {
      create: () => this.create(),
      open: (id) => this.open(id),
      remove: (conversation) => this.remove(conversation),
      importFile: (file) => this.importFile(file),
      exportAll: () => download("conversations.json", toFile([...this.conversations.values()])),
      help: () => help(Boolean(this.serverStore)),
    });
    element("shade").addEventListener("click", () => this.toggleSidebar(false));
    document.addEventListener("keydown", (event) => this.key(event));
    this.current = newConversation(newId(), Date.now());
    this.draw();
    document.documentElement.dataset.ready = "true";
    await Promise.all([this.loadStore(), this.loadModels()]);
    this.draw();
    if (matchMedia("(hover: hover)").matches) this.composer.focus(); // a phone's keyboard would cover half of the page
  }

  /** Conversations of this browser. Where the server keeps them, new ones go there, and those that are here stay here. */
  async loadStore() {
    this.browserStore = await openStore().catch(forgetfulStore);
    const own = await this.browserStore.all();
    this.inBrowser = new Set(own.map((each) => each.id));
    this.takeAll(own);
  }

  async loadKept() {
    this.serverStore = serverStore(api.kept);
    try {
      this.takeAll(await this.serverStore.all());
    } catch (error) {
      announce(`The server's conversations cannot be read: ${error.message}`);
    }
  }

  storeOf(id) {
    return this.serverStore && !this.inBrowser.has(id) ? this.serverStore : this.browserStore;
  }

  takeAll(conversations) {
    for (const each of conversations.filter(isConversation)) this.conversations.set(each.id, settled(each));
    const last = this.conversations.get(sessionStorage.getItem("kogia-current"));
    if (last && !selectedPath(this.current).length) this.current = last;
  }

  async loadModels() {
    try {
      const { models, keeps } = await api.models();
      this.models = models;
      this.problem = null;
      if (keeps && !this.serverStore) await this.loadKept();
    } catch (error) {
      this.problem = error.message;
      if (error.status === 401) await this.askKey();
      else setTimeout(() => this.loadModels().then(() => this.draw()), 2000); // it may still be loading
    }
  }

  async askKey() {
    api.rememberKey(null);
    const key = await entered("This server asks for a key", "Key", "", { type: "password", action: "Open" });
    if (!key) return;
    api.rememberKey(key);
    await this.loadModels();
  }

  get model() {
    return this.served(this.current.settings.model);
  }

  /** The model of a name, or the first where it is not served (any more). */
  served(name) {
    return this.models.find((each) => each.name === name) ?? this.models[0];
  }

  // Drawing -----------------------------------------------------------------------------------------------------------

  draw() {
    this.drawList([...this.conversations.values()], this.current.id);
    this.drawHead();
    this.messages.show(this.current, () => this.greeting());
    this.drawFacts();
  }

  drawHead() {
    const isEmpty = !selectedPath(this.current).length;
    const title = this.current.title || "New conversation";
    document.title = isEmpty ? "kogia" : `${title} · kogia`;
    element("head").replaceChildren(
      button("Conversations", "menu", () => this.toggleSidebar(), { class: "menu", "aria-controls": "sidebar" }),
      h("h1", {}, isEmpty ? title : h("button", { type: "button", title: "Rename", onclick: () => this.rename() }, title)),
      h("span", { class: "model soft" }, this.model?.name ?? ""),
      h("span", { class: "space" }),
      isEmpty ? "" : button("Export this conversation", "save", () => this.exportCurrent()),
      button("Light or dark", "theme", () => this.toggleTheme()),
      button("Settings", "settings", () => this.settings(), { "aria-expanded": this.panel === "settings" }),
    );
  }

  greeting() {
    const { model } = this;
    if (!model) return h("div", { class: "greeting" }, h("p", { role: "status" }, this.problem ?? "Connecting…"));
    const experts = model.topk ? `, ${short(model.active_params)} of them active for each token: ${model.topk} of ${model.num_experts} experts in ${model.num_mixtures} layers` : "";
    return h(
      "div",
      { class: "greeting" },
      h("h2", {}, model.name),
      h("p", {}, `${short(model.params)} parameters${experts}.`),
      h("p", { class: "soft" }, `Reads and writes up to ${formatted(model.context)} tokens. ${this.serverStore ? "What you write is kept on this server." : "What you write stays in this browser and on the server that answers."}`),
    );
  }

  drawFacts() {
    const last = selectedPath(this.current).filter((node) => node.role === "assistant").at(-1);
    const used = last ? (last.prompt_tokens ?? 0) + (last.tokens ?? 0) : 0;
    const isStreaming = last?.state === "streaming";
    const rate = isStreaming && last.rate ? `${formatted(last.rate)} tokens/s` : "";
    this.composer.update({ isRunning: this.runningHere().length > 0, used, length: this.model?.context ?? 0, words: rate });
  }

  /** Takes a changed conversation, shows it if it is open, and saves it. */
  change(conversation, { save = true } = {}) {
    if (Object.keys(conversation.nodes).length) this.conversations.set(conversation.id, conversation);
    if (conversation.id === this.current.id) this.current = conversation;
    if (save) this.save(conversation);
    this.draw();
  }

  save(conversation) {
    if (!Object.keys(conversation.nodes).length) return;
    this.saved.set(conversation.id, Date.now());
    const store = this.storeOf(conversation.id);
    store?.put(conversation).then(
      (written) => {
        element("notice").hidden = true;
        if (store === this.serverStore) this.takeMerged(written);
      },
      (error) => this.notKept(error),
    );
  }

  /** What another tab has added to a conversation of this one. */
  takeMerged(written) {
    const own = this.conversations.get(written.id);
    if (!own || Object.keys(written.nodes).every((id) => own.nodes[id])) return;
    this.change(mergeConversations(own, written), { save: false });
  }

  notKept(error) {
    const notice = element("notice");
    notice.textContent = error?.status ? `The server does not keep this conversation: ${error.message}` : "This conversation is not kept: it lasts as long as this page";
    notice.hidden = false;
  }

  // Conversations -----------------------------------------------------------------------------------------------------

  create() {
    this.open(null);
    this.composer.focus();
  }

  open(id) {
    this.current = this.conversations.get(id) ?? newConversation(newId(), Date.now(), this.current.settings);
    sessionStorage.setItem("kogia-current", this.current.id);
    this.toggleSidebar(false);
    this.closePanel();
    this.draw();
    this.messages.toBottom();
  }

  async remove(conversation) {
    if (!(await confirmed("Delete this conversation?", conversation.title || "New conversation", "Delete"))) return;
    this.stop(conversation);
    this.conversations.delete(conversation.id);
    await this.storeOf(conversation.id).remove(conversation.id).catch((error) => this.notKept(error));
    if (conversation.id === this.current.id) this.open(null);
    else this.draw();
  }

  async rename() {
    const title = await entered("Rename", "Title", this.current.title);
    if (title?.trim()) this.change({ ...this.current, title: titleOf(title) });
  }

  async importFile(file) {
    try {
      const read = fromFile(await file.text(), newId);
      for (const each of read) {
        this.conversations.set(each.id, each);
        this.save(each);
      }
      announce(`${read.length} conversations were imported`);
      if (read[0]) this.open(read[0].id);
    } catch (error) {
      await confirmed("The file was not imported", error.message, "Close");
    }
  }

  async exportCurrent() {
    const kind = await chosen("Export this conversation", [["md", "Markdown, this branch"], ["json", "JSON, all branches, to import again"]]);
    const name = (this.current.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
    if (kind === "md") download(`${name}.md`, toMarkdown(this.current), "text/markdown");
    if (kind === "json") download(`${name}.json`, toFile([this.current]));
  }

  // Questions and answers ---------------------------------------------------------------------------------------------

  ask(text, parent = selectedPath(this.current).at(-1)?.id ?? null) {
    if (!this.models.length) return false;
    const id = newId();
    this.change(addNode(this.current, { id, parent, role: "user", content: text }, Date.now()));
    sessionStorage.setItem("kogia-current", this.current.id);
    const { settings, other } = this.current;
    this.answer(id, other ? [settings, other] : [settings]);
    this.messages.toBottom();
    return true;
  }

  edit(node, text) {
    if (text.trim() && text !== node.content) this.ask(text, node.parent);
    else this.messages.drawn = "";
    this.draw();
  }

  /** Has a message answered, once for each of the settings; two answers stand side by side. */
  answer(parent, settings) {
    if (!this.models.length) return;
    const asked = settings.map((each) => ({ ...each, model: this.served(each.model).name }));
    const ids = asked.map(newId);
    const conversationId = this.current.id;
    let next = this.current;
    // the first is added last: it is the one that is selected
    for (const at of [...ids.keys()].reverse()) next = addNode(next, emptyAnswer(ids[at], parent, asked[at]), Date.now());
    next = pairNodes(next, parent, ids.length === 2 ? ids : null);
    const blocks = ids.map((id) => this.messages.begin(id));
    const controllers = ids.map((id) => this.running.set(id, new AbortController()).get(id));
    this.change(next);
    ids.forEach((id, at) => this.run(conversationId, id, requestOf(next, parent, asked[at]), blocks[at], controllers[at]));
  }

  async run(conversationId, id, body, blocks, controller) {
    const node = () => this.conversations.get(conversationId)?.nodes[id];
    announce("The model is answering");
    await generate(body, node(), blocks, controller.signal, (change) => this.progress(conversationId, id, change));
    this.running.delete(id);
    const ended = node();
    if (!ended) return;
    announce({ done: "The answer is complete", stopped: "The answer was stopped", failed: `The answer failed: ${ended.error}` }[ended.state]);
    this.change(this.conversations.get(conversationId));
    if (ended.status === 401) await this.askKey();
  }

  /** What one event changes: the element of its message, and now and then what is saved. */
  progress(conversationId, id, change) {
    const before = this.conversations.get(conversationId);
    if (!before) return;
    const next = changeNode(before, id, change);
    this.conversations.set(conversationId, next);
    if (Date.now() - (this.saved.get(conversationId) ?? 0) > SAVE_PAUSE) this.save(next);
    if (conversationId !== this.current.id) return;
    this.current = next;
    this.messages.conversation = next;
    this.messages.update(next.nodes[id]);
    this.drawFacts();
  }

  runningHere(conversation = this.current) {
    return [...this.running.keys()].filter((id) => conversation.nodes[id]);
  }

  stop(conversation = this.current) {
    for (const id of this.runningHere(conversation)) this.running.get(id).abort();
  }

  async answerNow(id) {
    const request = this.current.nodes[id]?.request;
    if (request) await api.stopThinking(request).catch((error) => announce(error.message));
  }

  pair(node) {
    const siblings = siblingsOf(this.current, node.id);
    const at = siblings.findIndex((each) => each.id === node.id);
    const other = siblings[at - 1] ?? siblings[at + 1];
    this.change(pairNodes(this.current, node.parent, this.current.pairs[node.parent] ? null : [other.id, node.id]));
  }

  // The panel ---------------------------------------------------------------------------------------------------------

  async settings() {
    if (this.panel === "settings") return this.closePanel();
    this.openPanel("settings");
    if (this.models.length > 1) await this.loadModels(); // which of them are loaded may have changed
    if (this.panel !== "settings") return;
    const change = (changed) => this.change({ ...this.current, ...changed });
    const compareWith = (other) => {
      change({ other });
      show();
    };
    const show = () => settingsView(element("panel"), this.current, this.models, { change, compareWith, close: () => this.closePanel() });
    show();
  }

  async inspect(node) {
    if (this.panel === node.id) return this.closePanel();
    this.openPanel(node.id);
    const panel = element("panel");
    panel.replaceChildren(h("p", { role: "status", class: "soft" }, "Running the answer once more…"));
    const settings = node.settings ?? PLAIN_SETTINGS;
    const body = { ...requestOf(this.current, node.parent, { ...settings, model: node.model }), token_ids: node.token_ids };
    try {
      const trace = await api.trace(body);
      if (this.panel === node.id) inspectView(panel, trace, this.served(trace.model), () => this.closePanel());
    } catch (error) {
      panel.replaceChildren(h("div", { class: "row" }, h("span", { class: "space" }), button("Close", "close", () => this.closePanel())), h("p", { class: "notice", role: "alert" }, error.message));
    }
  }

  openPanel(what) {
    this.panel = what;
    this.opener = document.activeElement;
    element("panel").hidden = false;
    element("panel").focus();
    document.body.classList.toggle("wide-panel", what !== "settings");
    this.drawHead();
  }

  closePanel() {
    if (!this.panel) return;
    this.panel = null;
    element("panel").hidden = true;
    document.body.classList.remove("wide-panel");
    this.drawHead();
    if (this.opener?.isConnected) this.opener.focus();
    else this.composer.focus();
  }

  toggleSidebar(open = !document.body.classList.contains("sidebar-open")) {
    // where there is room for it, it is always there
    const covers = open && matchMedia("(max-width: 760px)").matches;
    document.body.classList.toggle("sidebar-open", covers);
    element("shade").hidden = !covers;
    if (open) element("search").focus();
  }

  toggleTheme() {
    const root = document.documentElement;
    const isDark = root.dataset.theme === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : root.dataset.theme === "dark";
    root.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem("kogia-theme", root.dataset.theme);
  }

  key(event) {
    if (element("dialog").open || event.isComposing) return;
    const last = selectedPath(this.current).filter((node) => node.role === "assistant").at(-1);
    if (event.key === "Escape") this.escape();
    else if ((event.ctrlKey || event.metaKey) && event.key === "k") this.toggleSidebar(true);
    else if (event.altKey && event.code === "KeyN") this.create();
    else if (event.altKey && event.code === "KeyA") this.runningHere().forEach((id) => this.answerNow(id));
    else if (event.altKey && event.code === "KeyS") this.settings();
    else if (event.altKey && event.code === "KeyI" && last?.token_ids) this.inspect(last);
    else return;
    event.preventDefault();
  }

  escape() {
    if (document.body.classList.contains("sidebar-open")) this.toggleSidebar(false);
    else if (this.runningHere().length) this.stop();
    else this.closePanel();
  }
}

/** What a store brings may be of another version, or damaged: enough that the page can draw it. */
function isConversation(value) {
  const fits = typeof value?.id === "string" && typeof value.title === "string" && Number.isFinite(value.updated);
  const parts = ["nodes", "selected", "pairs", "settings"];
  return fits && parts.every((name) => value[name] !== null && typeof value[name] === "object");
}

function download(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

new App().start();
