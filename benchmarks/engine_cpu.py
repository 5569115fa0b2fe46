"""The engine on a CPU beside llama.cpp and transformers, in one run.

    python benchmarks/engine_cpu.py --dir SCRATCH --llama-python PATH [--rounds 5]
                                    [--out benchmarks/results/engine_cpu.json]

The model is random: 110.5M parameters in the shape of DeepSeek-V3, of which 39M are active. It is saved, converted to
GGUF by kogia (bf16, and q8_0 beside our int8), and run by all three with one thread, per second of CPU time: what else
the machine does then takes a share of every program's memory bandwidth, but no time. Every round measures ours and
theirs one after the other, each in a process of its own, and ratios are of a round; figures are medians of the rounds,
with the least and the greatest.

Decoding: 64 tokens behind a prompt of 8, the difference between completions of 65 tokens and of one. Prompts: 256
tokens and the first that follows.

The last rows are of three layers of DeepSeek-V2-Lite with its head, random int4 weights, in two threads: the share of a
step's time in which the memory could deliver its bytes, at the rate at which these threads read 1 GiB.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from result import row, write_result

from kogia.checkpoint.convert import convert_to_gguf
from kogia.checkpoint.hf import load_model, save_model
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.inference.bench import step_bytes
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.linear import Linear
from kogia.model.presets import preset
from kogia.model.transformer import Transformer, build_model
from kogia.text.tokenizer import train_bpe

ROOT = Path(__file__).parent.parent
VOCAB, PROMPT, TOKENS, SHORT = 32000, 256, 64, 8
LITE_LAYERS = 3
SMALL = ModelConfig(
    vocab_size=VOCAB,
    dim=512,
    num_layers=8,
    ffn_dim=1536,
    max_position=4096,
    attention=MLAConfig(
        num_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    ),
    moe=MoEConfig(num_experts=24, num_shared_experts=1, topk=4, expert_dim=256, routed_scale=2.5),
)
RATIOS = {
    "cpu-bf16-b1-ratio": ("bf16", "decode-1", ("llama bf16",)),
    "cpu-int8-b1-ratio": ("int8", "decode-1", ("llama q8_0",)),
    "cpu-int8-b8-ratio": ("int8", "decode-8", ("llama q8_0",)),
    "cpu-bf16-b8-ratio": ("bf16", "decode-8", ("llama bf16",)),
    "cpu-prefill-ratio": ("bf16", "prefill", ("llama bf16", "transformers")),
}
"""Figure -> our weights, what is measured, and the peers, of which the better one counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory for the model")
    parser.add_argument("--llama-python", required=True, help="an interpreter that has llama_cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine_cpu.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](args.dir, *args.child[1:])))
        return
    model = args.dir / "model"
    if not model.exists():
        make_model(model)
    files = {kind: args.dir / f"model-{kind}.gguf" for kind in ("bf16", "q8_0")}
    for kind, file in files.items():
        if not file.exists():
            convert_to_gguf(model, file, kind=kind)
    rounds = []
    for _ in range(args.rounds):
        rounds.append(one_round(args.dir, files, args.llama_python))
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    lite = _child(args.dir, "lite", str(args.rounds))
    rows = ratio_rows(rounds) + speed_rows(rounds) + lite_rows(lite)
    write_result(args.out, "engine_cpu", rows)
    print(json.dumps(rows, indent=1))


def make_model(target: Path) -> None:
    """The random model with a tokenizer of its own, trained on this repository."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("**/*.py")) if ".venv" not in path.parts]
    save_model(build_model(SMALL, dtype=torch.bfloat16), target, train_bpe(texts, VOCAB))


def one_round(directory: Path, files: dict[str, Path], llama_python: str) -> dict[str, dict[str, float]]:
    """Who -> what -> tokens per second of CPU time."""
    found: dict[str, dict[str, float]] = {}
    for ours, theirs in (("bf16", "bf16"), ("int8", "q8_0"), ("int4", None)):
        found[ours] = _child(directory, "kogia", ours)
        if theirs is not None:
            found[f"llama {theirs}"] = llama(files[theirs], llama_python)
    found["transformers"] = _child(directory, "transformers")
    return found


def llama(file: Path, python: str) -> dict[str, float]:
    found = {}
    for batch in (1, 8):
        words = [
            python,
            str(ROOT / "benchmarks/llama_cpp_peer.py"),
            "1",
            str(batch),
            str(PROMPT),
            str(TOKENS),
            str(file),
        ]
        done = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        found[f"decode-{batch}"] = done["decode"]
        if done["prefill"] is not None:
            found["prefill"] = done["prefill"]
    return found


def _child(directory: Path, *words: str) -> Any:
    command = [sys.executable, __file__, "--dir", str(directory), "--llama-python", "-", "--child", *words]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def run_kogia(directory: Path, weights: str) -> dict[str, float]:
    """A child's part: our engine on the weights as they are, or packed."""
    torch.set_num_threads(1)
    model = load_model(directory / "model", quantize=None if weights == "bf16" else weights)
    engine = Engine(model, None, EngineConfig(num_blocks=2000, prefix_cache=False))
    found = {f"decode-{batch}": decode_rate(engine, batch, time.process_time) for batch in (1, 8)}
    return found | {"prefill": prefill_rate(engine)}


def decode_rate(engine: Engine, batch: int, clock: Callable[[], float]) -> float:
    generator = np.random.default_rng(0)

    def seconds(tokens: int) -> float:
        prompts = generator.integers(0, engine.model.config.vocab_size, (batch, SHORT)).tolist()
        started = clock()
        engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))
        return clock() - started

    seconds(8)
    one = median(seconds(1) for _ in range(3))
    return batch * TOKENS / (median(seconds(TOKENS + 1) for _ in range(3)) - one)


def prefill_rate(engine: Engine) -> float:
    generator, found = np.random.default_rng(1), []
    for _ in range(4):
        prompt = generator.integers(0, engine.model.config.vocab_size, PROMPT).tolist()
        started = time.process_time()
        engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        found.append(PROMPT / (time.process_time() - started))
    return median(found[1:])


def run_transformers(directory: Path) -> dict[str, float]:
    """A child's part: transformers, with its grouped products."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")
    found = {}
    with torch.inference_mode():
        for batch in (1, 8):
            given = model(torch.randint(5, VOCAB, (batch, SHORT)), use_cache=True)
            token, cache = given.logits[:, -1:].argmax(-1), given.past_key_values
            started = time.process_time()
            for _ in range(TOKENS // 2):
                given = model(token, past_key_values=cache, use_cache=True)
                token = given.logits[:, -1:].argmax(-1)
            found[f"decode-{batch}"] = batch * (TOKENS // 2) / (time.process_time() - started)
        prompt, rates = torch.randint(5, VOCAB, (1, PROMPT)), []
        for _ in range(4):
            started = time.process_time()
            model(prompt, logits_to_keep=1)
            rates.append(PROMPT / (time.process_time() - started))
    return found | {"prefill": median(rates[1:])}


def run_lite(directory: Path, rounds: str) -> list[dict[str, float]]:
    """A child's part: layers of V2-Lite's shape in int4, two threads."""
    torch.set_num_threads(2)
    engine = Engine(lite_model(), None, EngineConfig(num_blocks=200, prefix_cache=False))
    size, found = step_bytes(engine, 1, SHORT + TOKENS / 2), []
    for _ in range(int(rounds)):
        rate, read = decode_rate(engine, 1, time.perf_counter), read_rate()
        found.append({"tokens": rate, "bytes": size, "read": read, "share": rate * size / read})
    return found


def lite_model() -> Transformer:
    config = replace(preset("deepseek-v2-lite"), num_layers=LITE_LAYERS, max_position=4096)
    model = build_model(config, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack("int4")
    return model


def read_rate() -> float:
    """Bytes per second that torch's threads read, at best."""
    memory, rates = torch.ones(2**28, dtype=torch.float32), []
    for _ in range(7):
        started = time.perf_counter()
        memory.sum()
        rates.append(memory.nbytes / (time.perf_counter() - started))
    return max(rates)


CHILDREN: dict[str, Callable[..., Any]] = {
    "kogia": run_kogia,
    "transformers": run_transformers,
    "lite": run_lite,
}


def ratio_rows(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for id, (ours, what, peers) in RATIOS.items():
        values = [each[ours][what] / max(each[peer][what] for peer in peers) for each in rounds]
        peer = median(max(each[peer][what] for peer in peers) for each in rounds)
        rows.append(_row(id, values, "x", peer=round(peer, 1)))
    return rows


def speed_rows(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    names = [(who, what) for who, found in rounds[0].items() for what in found]
    return [_row(f"{who}: {what}", [each[who][what] for each in rounds], "tokens/s") for who, what in names]


def lite_rows(found: list[dict[str, float]]) -> list[dict[str, Any]]:
    return [
        _row("cpu-v2lite-int4-share", [each["share"] for each in found], "of the read rate"),
        _row("v2lite-3-layers-int4", [each["tokens"] for each in found], "tokens/s"),
        _row("read-rate-2-threads", [each["read"] / 1e9 for each in found], "GB/s"),
    ]


def _row(id: str, values: list[float], unit: str, **extra: Any) -> dict[str, Any]:
    return row(id, median(values), unit, low=min(values), high=max(values), **extra)


if __name__ == "__main__":
    main()
