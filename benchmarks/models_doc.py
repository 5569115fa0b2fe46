"""Write the tables of docs/models.md from the presets, between its marks.

python benchmarks/models_doc.py
"""

from pathlib import Path

from kogia.checkpoint.inspect_table import count, flop_count, size
from kogia.model.config import ModelConfig
from kogia.model.costs import attention_twins, cache_bytes_per_token, model_costs
from kogia.model.facts import architecture, attention_name
from kogia.model.presets import PRESETS

DOC = Path(__file__).parent.parent / "docs" / "models.md"
COMPARED = ("deepseek-v3", "deepseek-v2-lite", "deepseek-moe-16b", "llama-2-7b", "llama-3.1-8b", "qwen3-30b-a3b")
LONG = 131072


def main() -> None:
    DOC.write_text(written(DOC.read_text(encoding="utf-8")), encoding="utf-8")


def written(text: str) -> str:
    """`text` with each table as the presets have it now."""
    for name, table in (("presets", preset_table()), ("cache", cache_table())):
        begin, end = f"<!-- {name}: benchmarks/models_doc.py -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + "\n".join([begin, *table, end]) + rest.split(end)[1]
    return text


def preset_table() -> list[str]:
    names: dict[ModelConfig, list[str]] = {}
    for name, config in PRESETS.items():
        names.setdefault(config, []).append(name)
    lines = _head("preset", "total", "per token", "layers x width", "attention", "feed-forward", "context", "forward")
    for config, same in names.items():
        costs = model_costs(config, min(4096, config.max_position))
        share = f" ({costs.active_share:.1%})" if config.moe is not None else ""
        cells = [
            ", ".join(f"`{name}`" for name in same),
            count(costs.params),
            count(costs.active_params) + share,
            f"{config.num_layers} x {config.dim:,}",
            _attention(config),
            _feed_forward(config),
            _context(config),
            flop_count(costs.forward_flops[costs.context]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _attention(config: ModelConfig) -> str:
    a = config.attention
    if a.kind == "gqa":
        bias, norm = ", QKV bias" if a.qkv_bias else "", ", QK norm" if a.qk_norm else ""
        return f"{attention_name(a)}, {a.num_heads} x {a.head_dim}{bias}{norm}"
    query = "" if a.q_lora_rank is None else f"{a.q_lora_rank:,} / "
    return f"{attention_name(a)}, {a.num_heads} heads, rank {query}{a.kv_lora_rank}"


def _feed_forward(config: ModelConfig) -> str:
    moe = config.moe
    if moe is None:
        return f"{config.ffn_dim:,}"
    shared = f" + {moe.num_shared_experts}" if moe.num_shared_experts else ""
    return f"{moe.topk} of {moe.num_experts}{shared} x {moe.expert_dim:,}, {moe.score}"


def _context(config: ModelConfig) -> str:
    rotary = architecture(config)["rotary"].partition("; ")[2].partition(", ")[0]
    return f"{config.max_position:,}, {rotary}" if rotary else f"{config.max_position:,}"


def cache_table() -> list[str]:
    lines = _head("preset", "its own", f"at {LONG:,} tokens", "MHA", "GQA-8", "MQA", "MLA")
    for name in COMPARED:
        config = PRESETS[name]
        own = attention_name(config.attention)
        models = (config, *attention_twins(config))
        per_token = {attention_name(model.attention): size(cache_bytes_per_token(model)) for model in models}
        kinds = [f"{per_token[kind]}*" if kind == own else per_token[kind] for kind in ("MHA", "GQA-8", "MQA", "MLA")]
        cells = [f"`{name}`", f"{own}, {per_token[own]}", size(cache_bytes_per_token(config) * LONG), *kinds]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


if __name__ == "__main__":
    main()
