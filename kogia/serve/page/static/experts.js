// What of a mixture of experts ran: counts, balance and the share of parameters. Pure.

const NOBODY = 0xffff;

/** A trace's experts: base64 of little-endian uint16 [tokens, layers, topk]. */
export function decodeExperts(base64, tokens, layers) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const ids = new Uint16Array(bytes.buffer);
  const topk = tokens * layers ? ids.length / (tokens * layers) : 0;
  return { ids, tokens, layers, topk };
}

/** Tokens that each expert of each layer had, of the tokens from `start` to before `end`: [layers * experts] counts. */
export function countExperts({ ids, layers, topk }, experts, start, end) {
  const counts = new Uint32Array(layers * experts);
  for (let at = start * layers * topk; at < end * layers * topk; at++) {
    const layer = Math.floor(at / topk) % layers;
    if (ids[at] !== NOBODY) counts[layer * experts + ids[at]] += 1;
  }
  return counts;
}

/** Of each layer: MaxVio, the busiest expert's load over the mean less 1 (DeepSeek-V3 section 4.5.3), and experts unused. */
export function balance(counts, layers, experts) {
  return Array.from({ length: layers }, (_, layer) => {
    const own = counts.subarray(layer * experts, (layer + 1) * experts);
    const sum = own.reduce((one, other) => one + other, 0);
    const unused = own.filter((count) => count === 0).length;
    return { maxVio: sum ? (Math.max(...own) * experts) / sum - 1 : 0, unused, busiest: own.indexOf(Math.max(...own)) };
  });
}

/** Parameters that one token is multiplied with, where it uses `topk` routed experts. */
export function activeParams(model, topk) {
  return model.active_params + (topk - model.topk) * model.expert_params;
}

export function shareWords(model, topk) {
  const active = activeParams(model, topk);
  return `${short(active)} of ${short(model.params)} parameters (${((100 * active) / model.params).toFixed(1)} %)`;
}

/** 671026419200 -> "671B". */
export function short(count) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (count >= size) return `${Number((count / size).toPrecision(3))}${unit}`;
  }
  return String(count);
}
