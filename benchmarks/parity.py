"""Logits beside transformers' on the same random weights: every architecture, dtype and kind of position.

    python benchmarks/parity.py [--out benchmarks/results/parity.json] [--docs docs/parity.md]

The figure is max |ours - theirs| / max |theirs| over the vocabulary and two sequences. Positions: the first two, the
middle, and the last, which lies past the original context in the YaRN cases. "cached" runs the same tokens through the
paged cache: a prefill chunk, then one token at a time. Sizes are odd on purpose.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from result import row, write_result
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

from kogia.checkpoint.hf import load_model
from kogia.model.cache import build_cache
from kogia.model.packed import pack
from kogia.model.transformer import Transformer

LIMIT = 2e-5
POSITIONS = {"first": 0, "second": 1, "middle": 20, "last": 39}
TOKENS = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))

YARN = {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN_V2 = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}
PLAIN_YARN = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}

SIZES: dict[str, Any] = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3)
SIZES |= dict(max_position_embeddings=64)
EXPERTS = dict(
    moe_intermediate_size=9, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=1, topk_group=1
)
LATENT = dict(
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=10,
    kv_lora_rank=12,
    qk_nope_head_dim=7,
    qk_rope_head_dim=4,
    v_head_dim=5,
)
V3 = SIZES | EXPERTS | LATENT | dict(first_k_dense_replace=1, routed_scaling_factor=2.5)
V32 = V3 | dict(index_n_heads=9, index_head_dim=6, index_topk=8)
V2 = SIZES | EXPERTS | LATENT | dict(first_k_dense_replace=1, routed_scaling_factor=16.0, norm_topk_prob=False)
V2 |= dict(qk_nope_head_dim=6)  # their V2 cannot run with an odd one
HEADS = SIZES | dict(num_attention_heads=6, num_key_value_heads=2, head_dim=6)
MOE16 = SIZES | dict(num_attention_heads=4, num_key_value_heads=4) | EXPERTS
MOE16 |= dict(first_k_dense_replace=1, norm_topk_prob=False)
QWEN_MOE = HEADS | dict(moe_intermediate_size=9, num_experts=8, num_experts_per_tok=3)

# architecture -> case -> fields of the transformers configuration
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "DeepseekV3": {
        "v3, groups": V3 | dict(n_group=4, topk_group=2),
        "direct queries": V3 | dict(q_lora_rank=None),
        "two shared experts, no normalisation": V3 | dict(n_shared_experts=2, norm_topk_prob=False),
        "yarn": V3 | dict(rope_parameters=YARN),
        "yarn of v2, groups": V3 | dict(rope_parameters=YARN_V2, n_group=4, topk_group=3),
        "yarn with unequal mscales": V3 | dict(rope_parameters=YARN | {"mscale_all_dim": 0.5}),
        "tied, no dense layer, wide experts": V3
        | dict(tie_word_embeddings=True, first_k_dense_replace=0, moe_intermediate_size=16, hidden_size=32),
        "all layers dense": V3 | dict(first_k_dense_replace=3),
    },
    "DeepseekV32": {
        "v3.2, groups": V32 | dict(n_group=4, topk_group=2),
        "yarn": V32 | dict(rope_parameters=YARN),
        "index of one token": V32 | dict(index_topk=1),
        "index wider than the context": V32 | dict(index_topk=2048),
    },
    "DeepseekV2": {
        "v2, groups": V2 | dict(n_group=4, topk_group=3, topk_method="group_limited_greedy", n_shared_experts=2),
        "one group of many": V2 | dict(n_group=2, topk_group=1, topk_method="group_limited_greedy"),
        "lite: direct queries, greedy": V2 | dict(q_lora_rank=None, routed_scaling_factor=1.0),
        "yarn": V2 | dict(rope_parameters=YARN_V2),
        "tied, no dense layer": V2 | dict(tie_word_embeddings=True, first_k_dense_replace=0),
    },
    "Deepseek": {  # DeepSeekMoE 16B; transformers has no such class: its Llama with the experts of its DeepSeek-V2
        "moe-16b": MOE16 | dict(n_shared_experts=2),
        "top-1, scaled experts": MOE16 | dict(num_experts_per_tok=1, num_key_value_heads=2),
    },
    "Llama": {
        "grouped": HEADS | dict(rope_theta=500.0),
        "multi-head, tied": SIZES | dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True),
        "multi-query": HEADS | dict(num_key_value_heads=1),
        "llama3 rope": HEADS | dict(rope_parameters=LLAMA3),
    },
    "Qwen2": {
        "grouped": SIZES | dict(num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5),
        "tied, multi-query": SIZES | dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True),
        "yarn": SIZES | dict(num_attention_heads=4, num_key_value_heads=2, rope_parameters=PLAIN_YARN),
    },
    "Qwen3": {"grouped": HEADS, "tied": HEADS | dict(tie_word_embeddings=True, head_dim=10)},
    "Qwen3Moe": {
        "normalised": QWEN_MOE | dict(norm_topk_prob=True),
        "not normalised, tied": QWEN_MOE | dict(norm_topk_prob=False, tie_word_embeddings=True),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs/parity.md"))
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = [r for architecture in CASES for case in CASES[architecture] for r in case_rows(architecture, case)]
    write_result(args.out, "parity", rows)
    args.docs.write_text(render(json.loads(args.out.read_text())), encoding="utf-8")
    worst = max(r["value"] for r in rows if "limit" in r)
    print(f"{len(rows)} figures; largest in float32: {worst:.1e} (limit {LIMIT:.0e})")


def case_rows(architecture: str, case: str) -> Iterator[dict[str, Any]]:
    """The figures of one case: float32 and bfloat16, with and without the cache."""
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as directory:
            theirs = build_theirs(architecture, case, Path(directory))
            ours = load_model(directory, dtype=dtype)
        want = theirs_logits(theirs.to(dtype))
        for how, got in (("packed", packed_logits(ours)), ("cached", cached_logits(ours))):
            for place, position in POSITIONS.items():
                value = relative_difference(got[:, position], want[:, position])
                extra = {"limit": LIMIT} if dtype == torch.float32 else {}
                found = row(f"parity-{architecture}-{case}-{name}-{how}-{place}", 0.0, "relative", **extra)
                yield found | {"value": float(f"{value:.3g}")}


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def build_theirs(architecture: str, case: str, directory: Path) -> torch.nn.Module:
    """A random transformers model, saved into `directory` by transformers itself."""
    fields = CASES[architecture][case]
    if architecture == "Deepseek":
        return _deepseek_moe(fields, directory)
    config = getattr(transformers, f"{architecture}Config")(**fields)
    model = draw(getattr(transformers, f"{architecture}ForCausalLM")(config))
    if "moe_intermediate_size" in fields:  # their default experts refuse rows that are no multiple of 16 bytes
        model.set_experts_implementation("eager")
    model.save_pretrained(directory)
    return model


def _deepseek_moe(fields: dict[str, Any], directory: Path) -> torch.nn.Module:
    """DeepSeekMoE: transformers' Llama whose feed-forwards are transformers' DeepSeek-V2 experts."""
    llama = {key: value for key, value in fields.items() if key in HEADS}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama))
    experts = transformers.DeepseekV2Config(**(fields | dict(q_lora_rank=None)))
    experts._experts_implementation = "eager"
    for layer in model.model.layers[fields["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(experts)
    draw(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "down_proj") and prefix.endswith("experts"):
            for i, expert in enumerate(tensor):
                parts = expert.chunk(2) if last == "gate_up_proj" else [expert]
                for part, kind in zip(parts, ("gate", "up") if len(parts) == 2 else ("down",), strict=True):
                    tensors[f"{prefix}.{i}.{kind}_proj.weight"] = part.contiguous()
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    data = fields | {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "rms_norm_eps": 1e-6}
    (directory / "config.json").write_text(json.dumps(data | {"scoring_func": "softmax", "topk_method": "greedy"}))
    return model


def draw(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random: weights large enough to matter, norms around one, biases that change the routing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dtype.is_floating_point:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.2 * noise)
    return model.eval()


@torch.no_grad()
def theirs_logits(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits


@torch.no_grad()
def packed_logits(model: Transformer) -> Tensor:
    """[seqs, tokens, vocab] without a cache: both sequences in one packed batch."""
    return model.logits(model(pack(TOKENS.tolist()))).view(*TOKENS.shape, -1)


@torch.no_grad()
def cached_logits(model: Transformer, block_size: int = 4, chunk: int = 17) -> Tensor:
    """The same through the paged cache: one chunk of prefill, then token by token."""
    num_seqs, length = TOKENS.shape
    blocks = -(-length // block_size)
    pool = build_cache(model.config, num_seqs * blocks, block_size, dtype=model.dtype, device="cpu")
    tables = torch.randperm(num_seqs * blocks, generator=torch.Generator().manual_seed(2)).view(num_seqs, blocks)
    found = []
    for start, end in [(0, chunk), *((i, i + 1) for i in range(chunk, length))]:
        positions = torch.arange(start, end)
        batch = replace(pack(TOKENS[:, start:end].tolist()), positions=positions.repeat(num_seqs))
        slots = (tables[:, positions // block_size] * block_size + positions % block_size).flatten()
        contexts = torch.full((num_seqs,), end)
        cache = pool.step(slots, tables, contexts, contexts.numpy())
        found.append(model.logits(model(batch, cache)).view(num_seqs, end - start, -1))
    return torch.cat(found, 1)


def render(result: dict[str, Any]) -> str:
    """The table of docs/parity.md."""
    versions = result["versions"]
    lines = [
        "# Parity with transformers",
        "",
        f"Written by `benchmarks/parity.py` (torch {versions['torch']}, transformers {versions['transformers']}): "
        "random weights, odd sizes; max |ours - theirs| / max |theirs| over the logits at each position.",
        f'The limit in float32 is {LIMIT:.0e}. "cached" is the paged cache: absorbed attention, a prefill chunk and '
        "then token by token. The last position lies past the original context where YaRN is on.",
        "In bfloat16 both sides round, in different places; on random weights a rounded router score can choose "
        "another expert, which is why single figures there are large. Trained models: see tests/parity.",
        "",
        "| architecture | case | dtype | path | first | second | middle | last |",
        "|---|---|---|---|---|---|---|---|",
    ]
    values = {r["id"]: r["value"] for r in result["rows"]}
    for architecture, cases in CASES.items():
        for case in cases:
            for dtype in ("float32", "bfloat16"):
                for how in ("packed", "cached"):
                    ids = [f"parity-{architecture}-{case}-{dtype}-{how}-{place}" for place in POSITIONS]
                    shown = " | ".join(f"{values[id]:.1e}" for id in ids)
                    lines.append(f"| {architecture} | {case} | {dtype} | {how} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
