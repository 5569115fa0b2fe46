// An answer token by token: how likely each was, what stood beside it, and which experts it used.

import { balance, countExperts, decodeExperts, shareWords } from "./experts.js";
import { expertsPicture } from "./experts-view.js";
import { button, formatted, h } from "./html.js";

const LEVELS = [0.9, 0.5, 0.1, 0.01];
const LEVEL_WORDS = ["over 90 %", "50 to 90 %", "10 to 50 %", "1 to 10 %", "below 1 %"];

/** Fills the panel for a trace {tokens, token_ids, logprobs, top, thought_tokens, experts, layers} of an answer of `model`. */
export function inspectView(panel, trace, model, close) {
  const experts = trace.experts ? decodeExperts(trace.experts, trace.tokens.length, trace.layers.length) : null;
  const picture = experts ? expertsPicture(trace.layers, model.num_experts) : null;
  const words = h("div", { class: "token-words", "aria-live": "polite" });
  const summary = h("div", { class: "summary" });
  const strip = tokenStrip(trace, (index) => select(index));
  const parts = partsOf(trace);
  const part = h("select", { "aria-label": "Part of the answer", onchange: () => select(null) }, ...parts.map(([name], at) => h("option", { value: at }, name)));

  const select = (index) => {
    const [, start, end] = parts[part.value];
    strip.show(index, start, end);
    words.replaceChildren(...(index === null ? [h("p", { class: "soft" }, "Choose a token to see what else could have stood there, and its experts.")] : tokenWords(trace, index)));
    if (!experts) return;
    const [from, to] = index === null ? [start, end] : [index, index + 1];
    const counts = countExperts(experts, model.num_experts, from, to);
    picture.draw(counts, to - from);
    summary.replaceChildren(...expertWords(counts, trace, model, experts.topk, to - from));
  };

  panel.setAttribute("aria-label", "Tokens and experts");
  panel.replaceChildren(
    h("div", { class: "row" }, h("h2", {}, "Tokens and experts"), h("span", { class: "space" }), button("Close", "close", close)),
    h("div", { class: "row" }, h("h3", {}, "Probability of each token"), h("span", { class: "space" }), parts.length > 1 ? part : ""),
    h("ul", { class: "legend" }, ...LEVEL_WORDS.map((each, level) => h("li", { class: `p${level}` }, each))),
    strip.element,
    words,
    ...(experts ? [h("h3", {}, "Active experts"), summary, picture.element] : [h("p", { class: "soft" }, "This model is dense: every token uses all of it, so there are no experts to show.")]),
    h("p", { class: "soft small" }, "Found by running the answer once more as a prompt. Probabilities are the model's own, at temperature 1 and without filters."),
  );
  select(null);
}

function partsOf(trace) {
  const all = trace.tokens.length;
  const thought = Math.min(trace.thought_tokens, all);
  if (!thought || thought === all) return [["All tokens", 0, all]];
  return [["All tokens", 0, all], ["Thought", 0, thought], ["Answer", thought, all]];
}

export function levelOf(logprob) {
  const probability = Math.exp(logprob);
  const level = LEVELS.findIndex((least) => probability >= least);
  return level < 0 ? LEVELS.length : level;
}

/** Tokens in a row, one of which may be chosen by click or arrow keys. */
function tokenStrip(trace, choose) {
  const tokens = trace.tokens.map((text, index) =>
    h("span", { class: `token p${levelOf(trace.logprobs[index])}`, role: "option", "aria-selected": "false", "data-index": index, id: `token-${index}` }, visible(text)),
  );
  const element = h("div", { class: "tokens", role: "listbox", tabindex: 0, "aria-label": "Tokens of the answer" }, ...tokens);
  let chosen = null;
  element.addEventListener("click", (event) => {
    const index = event.target.dataset?.index;
    if (index !== undefined) choose(Number(index) === chosen ? null : Number(index));
  });
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape" && chosen !== null) {
      event.stopPropagation();
      choose(null);
    } else if (step) {
      event.preventDefault();
      const next = chosen === null ? 0 : chosen + step;
      if (tokens[next] && !tokens[next].hidden) choose(next);
    }
  });
  const show = (index, start, end) => {
    tokens.forEach((token, at) => {
      token.hidden = at < start || at >= end;
      token.setAttribute("aria-selected", at === index);
    });
    chosen = index;
    element.toggleAttribute("aria-activedescendant", false);
    if (index !== null) {
      element.setAttribute("aria-activedescendant", `token-${index}`);
      tokens[index].scrollIntoView({ block: "nearest" });
    }
  };
  return { element, show };
}

function visible(text) {
  return text.replaceAll("\n", "⏎\n") || "·";
}

function tokenWords(trace, index) {
  const rows = trace.top[index].map(([id, text, logprob]) => alternative(text, logprob, id === trace.token_ids[index]));
  return [
    h("p", {}, "Token ", h("b", {}, String(index + 1)), ` of ${trace.tokens.length}: `, h("code", {}, quoted(trace.tokens[index])), ` had ${percent(trace.logprobs[index])}`),
    h("ul", { class: "alternatives" }, ...rows),
  ];
}

function alternative(text, logprob, isChosen) {
  const bar = h("i", {});
  bar.style.width = `${Math.max(0.5, 100 * Math.exp(logprob))}%`;
  return h("li", { class: isChosen ? "chosen" : null }, h("code", {}, quoted(text)), h("span", { class: "bar" }, bar), h("span", {}, percent(logprob)));
}

function quoted(text) {
  return JSON.stringify(text);
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value < 0.01 ? "below 0.01 %" : `${value.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")} %`;
}

function expertWords(counts, trace, model, topk, tokens) {
  const layers = balance(counts, trace.layers.length, model.num_experts);
  const words = [
    h("p", {}, `Each token used ${topk} of ${model.num_experts} routed experts`, model.num_shared_experts ? ` and ${model.num_shared_experts} shared` : "", ` in each of ${trace.layers.length} layers: `, h("b", {}, shareWords(model, topk)), "."),
  ];
  if (tokens === 1) return words;
  const mean = layers.reduce((sum, each) => sum + each.maxVio, 0) / layers.length;
  const worst = layers.reduce((best, each, at) => (each.maxVio > layers[best].maxVio ? at : best), 0);
  const unused = layers.reduce((sum, each) => sum + each.unused, 0);
  words.push(
    h("p", {}, `Load over these ${formatted(tokens)} tokens: the busiest expert of a layer had ${(mean + 1).toFixed(1)} times the mean (MaxVio ${mean.toFixed(2)}); most uneven is layer ${trace.layers[worst]} with ${(layers[worst].maxVio + 1).toFixed(1)} times. ${formatted(unused)} of ${formatted(counts.length)} experts were not used.`),
    layerTable(layers, trace, tokens, counts, model.num_experts),
  );
  return words;
}

function layerTable(layers, trace, tokens, counts, experts) {
  const row = (each, at) =>
    h("tr", {}, h("th", { scope: "row" }, String(trace.layers[at])), h("td", {}, String(each.busiest)), h("td", {}, `${((100 * counts[at * experts + each.busiest]) / tokens).toFixed(0)} %`), h("td", {}, each.maxVio.toFixed(2)), h("td", {}, String(each.unused)));
  const head = ["Layer", "Busiest expert", "Used by", "MaxVio", "Unused"].map((name) => h("th", { scope: "col" }, name));
  return h("details", {}, h("summary", {}, "As a table"), h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...layers.map(row)))));
}
