// Layers by experts as a picture: the more tokens an expert had, the stronger its colour.

import { balance } from "./experts.js";
import { h } from "./html.js";

const LEAST_HEIGHT = 7;
const MOST_HEIGHT = 22;
const MOST_PICTURE = 420;
const MARGIN = 26;
const BARS = 40; // wide, at the right: how uneven each layer is

/** {element, draw(counts, tokens)} for layers of the given numbers, each of `experts` experts. */
export function expertsPicture(layers, experts) {
  const canvas = h("canvas", { role: "img", tabindex: 0 });
  const words = h("p", { class: "soft small", "aria-live": "polite" });
  const element = h("div", { class: "picture" }, canvas, words);
  let counts = new Uint32Array(layers.length * experts);
  let tokens = 0;
  let cursor = null;

  const size = () => {
    const width = canvas.clientWidth || 320;
    const height = Math.min(MOST_HEIGHT, Math.max(LEAST_HEIGHT, MOST_PICTURE / layers.length));
    return { width, cell: (width - MARGIN - BARS) / experts, height };
  };
  const paint = () => paintPicture(canvas, { ...size(), layers, experts, counts, tokens, cursor });
  const say = () => {
    words.textContent = cursor === null ? `Rows are layers, columns experts. ${tokens > 1 ? "Bars show how uneven each layer is (MaxVio). " : ""}Point at an expert, or use the arrow keys.` : cellWords(cursor, layers, experts, counts, tokens);
  };
  const move = (next) => {
    cursor = next;
    paint();
    say();
  };
  canvas.addEventListener("pointermove", (event) => {
    const { cell, height } = size();
    const expert = Math.floor((event.offsetX - MARGIN) / cell);
    const layer = Math.floor(event.offsetY / height);
    move(expert >= 0 && expert < experts && layer < layers.length ? { layer, expert } : null);
  });
  canvas.addEventListener("pointerleave", () => move(null));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const { layer, expert } = cursor ?? { layer: 0, expert: -step[1] };
    move({ layer: clamp(layer + step[0], layers.length), expert: clamp(expert + step[1], experts) });
  });
  new ResizeObserver(paint).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  const draw = (nextCounts, nextTokens) => {
    [counts, tokens] = [nextCounts, nextTokens];
    canvas.setAttribute("aria-label", `${layers.length} layers by ${experts} experts, shaded by how many of ${tokens} tokens used each`);
    paint();
    say();
  };
  return { element, draw };
}

function clamp(value, count) {
  return Math.max(0, Math.min(count - 1, value));
}

function cellWords({ layer, expert }, layers, experts, counts, tokens) {
  const count = counts[layer * experts + expert];
  if (tokens === 1) return `Layer ${layers[layer]}, expert ${expert}: ${count ? "active" : "not active"}`;
  return `Layer ${layers[layer]}, expert ${expert}: ${count} of ${tokens} tokens (${((100 * count) / tokens).toFixed(1)} %)`;
}

function paintPicture(canvas, { width, cell, height, layers, experts, counts, tokens, cursor }) {
  const scale = devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * layers.length * scale);
  canvas.style.height = `${height * layers.length}px`;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const most = counts.reduce((one, other) => Math.max(one, other), 1);
  const gap = cell > 4 ? 1 : 0;
  context.scale(scale, scale);
  context.font = "10px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (let layer = 0; layer < layers.length; layer++) {
    const top = layer * height;
    context.globalAlpha = 1;
    context.fillStyle = style.getPropertyValue("--soft");
    if (height >= 11 || layer % 5 === 0) context.fillText(String(layers[layer]), 0, Math.max(6, top + height / 2));
    for (let expert = 0; expert < experts; expert++) {
      const share = counts[layer * experts + expert] / most;
      context.globalAlpha = 1;
      context.fillStyle = style.getPropertyValue("--panel");
      context.fillRect(MARGIN + expert * cell, top, cell - gap, height - 1);
      context.globalAlpha = Math.sqrt(share);
      context.fillStyle = style.getPropertyValue("--accent");
      if (share) context.fillRect(MARGIN + expert * cell, top, cell - gap, height - 1);
    }
  }
  context.globalAlpha = 1;
  if (tokens > 1) paintBars(context, balance(counts, layers.length, experts), { left: width - BARS + 6, height, colour: style.getPropertyValue("--soft") });
  context.globalAlpha = 1;
  context.strokeStyle = style.getPropertyValue("--ink");
  if (cursor) context.strokeRect(MARGIN + cursor.expert * cell - 0.5, cursor.layer * height - 0.5, cell, height);
}

function paintBars(context, layers, { left, height, colour }) {
  const most = Math.max(...layers.map((each) => each.maxVio)) || 1;
  context.fillStyle = colour;
  context.globalAlpha = 0.6;
  layers.forEach(({ maxVio }, at) => context.fillRect(left, at * height + 1, ((BARS - 6) * maxVio) / most, height - 3));
}
