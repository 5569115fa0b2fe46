"""How long a 16B model takes from the start of a process to its first token, on a GPU: `ready-16b-seconds`.

    python benchmarks/ready_gpu.py --dir SCRATCH [--layers 27] [--rounds 3] [--out benchmarks/results/ready_gpu.json]

A checkpoint of DeepSeek-V2-Lite's shape with random bf16 weights is written to SCRATCH (31 GB; it stays there), so that
it is in the page cache. Then processes load it, compile, record and draw a token: one with an empty cache of compiled
kernels, as after an installation, and `--rounds` with the cache that it left, as ever after. Afterwards prompts of many
lengths come and go at all numbers of sequences: `compiled-after-ready` is how many kernels were compiled for them.
With --quantize weights are rounded to a format while they are loaded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=float, metavar="STARTED", help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.dir / "model"
    if args.child is not None:
        print(json.dumps(ready(model, args.child, args.quantize)))
        return
    from result import row, write_result

    if not (model / "config.json").exists():
        write_model(model, args.layers)
    with tempfile.TemporaryDirectory() as cache:
        found = [child(args, Path(cache)) for _ in range(args.rounds + 1)]
    first, later = found[0], found[1:]
    totals = [each["total"] for each in later]
    rows = [
        row("ready-16b-seconds", median(totals), "s", low=min(totals), high=max(totals), limit=20,
            stages=middle(later)),
        row("ready-16b-first-seconds", first["total"], "s", stages={k: first[k] for k in first if k != "total"}),
        row("compiled-after-ready", first["compiled_after"], "kernels", names=first["names"]),
    ]  # fmt: skip
    for each in rows:
        print(json.dumps(each), flush=True)
    if args.out is not None:
        write_result(args.out, "ready on a GPU", rows)


def middle(found: list[dict[str, Any]]) -> dict[str, float]:
    stages = [name for name in found[0] if isinstance(found[0][name], float) and name != "total"]
    return {name: round(median(each[name] for each in found), 2) for name in stages}


def write_model(directory: Path, layers: int) -> None:
    from engine_gpu import v2_lite

    from kogia.checkpoint.hf import save_model
    from kogia.text.tokenizer import train_bpe

    start = time.perf_counter()
    save_model(v2_lite(layers), directory, train_bpe(["No request has a text here."], 300))
    print(f"written in {time.perf_counter() - start:.1f} s", flush=True)


def child(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--dir", str(args.dir), "--quantize", args.quantize, "--child", repr(time.time())
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"TRITON_CACHE_DIR": str(cache)}, stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def ready(model: Path, started: float, quantize: str) -> dict[str, Any]:
    """Seconds by stage until the first token, and what was compiled later."""
    from triton import knobs

    from kogia.engine.request import SamplingParams
    from kogia.inference.llm import LLM

    compiled: list[str] = []

    def note(*, src: Any, **_: Any) -> None:
        compiled.append(src.name)

    knobs.compilation.listener = note
    imports = time.time() - started
    settings: dict[str, Any] = {"max_sequences": 256, "max_batch_tokens": 16384, "block_size": 64, "num_blocks": 5000}
    llm = LLM(model, device="cuda", quantize=quantize, **settings)
    llm.warm_up()
    known = len(compiled)
    start = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    llm.engine.generate([[5, 6, 7]], params)
    seconds = {"start": imports, **llm.readiness.seconds, "first token": time.perf_counter() - start}
    total = time.time() - started
    serve(llm.engine)
    names = sorted(set(compiled[known:]))
    return {**seconds, "total": total, "kernels": known, "compiled_after": len(compiled) - known, "names": names}


def serve(engine: Any) -> None:
    """Prompts of many lengths, greedy and not, filtered or not, alone and many at once, whole and in chunks."""
    from engine_gpu import prompts_of

    from kogia.engine.request import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    drawn = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=6, ignore_eos=True, seed=1)
    for length in (1, 2, 3, 4, 5, 17, 63, 64, 65, 200, 511, 777, 1500, 3000, 9000):
        for params in (greedy, drawn):
            engine.generate(prompts_of(1, length), params)
    for count in (2, 3, 7, 13, 33, 100, 200, 256):
        prompts = [prompt[: 3 + 11 * i % 400] for i, prompt in enumerate(prompts_of(count, 400))]
        engine.generate(prompts, [greedy if i % 2 else drawn for i in range(count)])


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    main()
