"""Time and peak host memory to load a sharded checkpoint, beside transformers.

    python benchmarks/load.py --dir SCRATCH [--size-mb 2000] [--repeats 5] [--out benchmarks/results/load.json]

A DeepSeek-V3-type checkpoint of random bfloat16 weights is written in four shards, and again in FP8. Each load runs in
a fresh process, ours and theirs in turn, with every import done and a tiny checkpoint loaded before the clock starts;
the files are in the page cache, and a first round is not counted. Extra memory is the process's peak resident set
during the load (the kernel's VmHWM, which counts touched pages of mapped files), less what was resident before and the
bytes of the model itself.

transformers maps the files and leaves what it need not stack for later, so a second clock runs until one number of
every page of the weights has been read. It does not load this FP8 checkpoint: it wants whole blocks.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from result import row, write_result

from kogia.checkpoint.convert import convert
from kogia.checkpoint.directory import create_weight_files
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.layout import disk_views
from kogia.checkpoint.tensorfile import row_ranges, write
from kogia.checkpoint.weights import CODES, as_bytes
from kogia.files import sync, write_json
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.costs import num_params
from kogia.model.hf_export import config_to_hf
from kogia.model.transformer import empty_model

ROOT = Path(__file__).parent.parent
NUM_SHARDS = 4
ATTENTION = MLAConfig(
    num_heads=16, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)
EXPERTS = MoEConfig(num_experts=32, topk=4, expert_dim=1408, num_groups=4, topk_groups=2, num_dense_layers=1)
WIDE = ModelConfig(vocab_size=32000, dim=2048, num_layers=2, ffn_dim=8192, attention=ATTENTION, moe=EXPERTS)
NARROW = replace(WIDE, vocab_size=4096, dim=512, ffn_dim=1024, moe=replace(EXPERTS, expert_dim=256))
TINY = replace(NARROW, vocab_size=64, dim=128, ffn_dim=128, moe=replace(EXPERTS, num_experts=8, expert_dim=128))
PAGE = 4096
BEGIN, END = "<!-- figures: benchmarks/results/load.json -->", "<!-- end of figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory; the checkpoints are deleted again")
    parser.add_argument("--size-mb", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/load.json")
    parser.add_argument(
        "--docs", type=Path, default=None, help="page to write the figures into, as docs/checkpoints.md"
    )
    parser.add_argument("--child", choices=list(LOADERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.dir)))
        return
    config = config_of_size(args.size_mb * 10**6)
    scratch = args.dir / "load-benchmark"
    try:
        make_checkpoint(scratch / "tiny", TINY, 0)
        convert(scratch / "tiny", scratch / "fp8-tiny", dtype="fp8", max_shard_bytes=0)
        make_checkpoint(scratch / "model", config, num_params(config) * 2 // NUM_SHARDS + 2**20)
        convert(scratch / "model", scratch / "fp8-model", dtype="fp8", max_shard_bytes=num_params(config) // NUM_SHARDS)
        rows = bfloat16_rows(scratch, args.repeats) + fp8_rows(scratch, args.repeats)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_result(args.out, "load", rows)
    print(json.dumps(rows, indent=1))
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text()))


# The checkpoint -------------------------------------------------------------------------------------------------------


def config_of_size(nbytes: int) -> ModelConfig:
    """As many layers as make about `nbytes` of bfloat16."""
    base = WIDE if nbytes > 10**9 else NARROW
    per_layer = num_params(replace(base, num_layers=base.num_layers + 1)) - num_params(base)
    extra = max(0, round((nbytes / 2 - num_params(base)) / per_layer))
    return replace(base, num_layers=base.num_layers + extra)


def make_checkpoint(directory: Path, config: ModelConfig, max_shard_bytes: int) -> None:
    """Random weights, drawn while they are written."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", config_to_hf(config, "bfloat16"))
    views = dict(disk_views(empty_model(config, torch.bfloat16)))
    specs = [(name, CODES[view.dtype], tuple(view.shape)) for name, view in views.items()]
    generator = torch.Generator().manual_seed(0)
    planned = create_weight_files(directory, specs, max_shard_bytes)
    for name, tensor in planned.items():
        for start, stop in row_ranges(tensor):
            rows = torch.empty(stop - start, *tensor.shape[1:]).normal_(0.0, 0.02, generator=generator)
            write(tensor, start, as_bytes(rows.to(views[name].dtype)))
    for file in {tensor.file for tensor in planned.values()}:
        sync(file)  # or the disk is still busy with them during the first load


# One load, in a process of its own ------------------------------------------------------------------------------------


def load_ours(directory: Path) -> torch.nn.Module:
    return load_model(directory, dtype=torch.bfloat16)


def load_ours_kept(directory: Path) -> torch.nn.Module:
    return load_model(directory, quantize="stored")


def load_theirs(directory: Path) -> torch.nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


LOADERS = {"ours": load_ours, "ours-fp8-kept": load_ours_kept, "theirs": load_theirs}


def measure(loader: str, directory: Path) -> dict[str, float]:
    """Seconds and bytes of one load, after everything lazy has happened on the tiny checkpoint beside it."""
    load = LOADERS[loader]
    load(directory.with_name(directory.name.replace("model", "tiny")))
    buffer = bytearray(2**16)
    for file in directory.glob("*.safetensors"):  # into the page cache
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = memory()
    start = time.perf_counter()
    model = load(directory)
    seconds = time.perf_counter() - start
    after = memory()
    touch(model)
    own = sum(t.nbytes for t in {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values())
    return {
        "seconds": seconds,
        "touched_seconds": time.perf_counter() - start,
        "model": own,
        "extra": after["VmHWM"] - before["VmRSS"] - own,
        "touched_extra": memory()["VmHWM"] - before["VmRSS"] - own,
    }


def memory() -> dict[str, int]:
    """Bytes by the kernel's names: VmRSS is resident now, VmHWM was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def touch(model: torch.nn.Module) -> None:
    """Read one byte of every page of the weights."""
    for tensor in model.parameters():
        tensor.detach().view(-1).view(torch.uint8)[::PAGE].sum()


# Rows -----------------------------------------------------------------------------------------------------------------


def in_turn(directory: Path, loaders: list[str], repeats: int) -> dict[str, list[dict[str, float]]]:
    """`repeats` measurements of each loader in turn, so that all see the same machine. A first round is dropped."""
    found: dict[str, list[dict[str, float]]] = {loader: [] for loader in loaders}
    for _ in range(1 + repeats):
        for loader in loaders:
            command = [sys.executable, __file__, "--dir", str(directory), "--child", loader]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[loader].append(json.loads(output.splitlines()[-1]))
    return {loader: each[1:] for loader, each in found.items()}


def bfloat16_rows(scratch: Path, repeats: int) -> list[dict[str, Any]]:
    found = in_turn(scratch / "model", ["ours", "theirs"], repeats)
    shard = largest_file(scratch / "model")
    return [
        ratio("load-time-ratio", found, "seconds", limit=1.0),
        ratio("load-touched-time-ratio", found, "touched_seconds"),
        spread("load-overhead-shards", found, "extra", shard, "shards", limit=1.05),
        spread("load-touched-overhead-shards", found, "touched_extra", shard, "shards"),
        spread("load-seconds", found, "seconds", 1, "s"),
        spread("load-touched-seconds", found, "touched_seconds", 1, "s"),
        row("load-model-mb", found["ours"][0]["model"] / 1e6, "MB"),
        row("load-shard-mb", shard / 1e6, "MB"),
    ]


def fp8_rows(scratch: Path, repeats: int) -> list[dict[str, Any]]:
    """The same model stored in FP8: dequantised to bfloat16 while loading, or kept."""
    found = in_turn(scratch / "fp8-model", ["ours", "ours-fp8-kept"], repeats)
    shard = largest_file(scratch / "fp8-model")
    kept = {"ours": found["ours-fp8-kept"]}
    return [
        spread("load-fp8-seconds", found, "seconds", 1, "s"),
        spread("load-fp8-overhead-shards", found, "extra", shard, "shards", limit=1.05),
        spread("load-fp8-kept-seconds", kept, "seconds", 1, "s"),
        spread("load-fp8-kept-overhead-shards", kept, "extra", shard, "shards", limit=1.05),
        row("load-fp8-shard-mb", shard / 1e6, "MB"),
    ]


def largest_file(directory: Path) -> int:
    return max(file.stat().st_size for file in directory.glob("*.safetensors"))


def ratio(id: str, found: dict[str, list[dict[str, float]]], key: str, **extra: Any) -> dict[str, Any]:
    """Ratio of the medians; low and high are the smallest and largest ratio of two loads in turn."""
    ours, theirs = ([m[key] for m in found[loader]] for loader in ("ours", "theirs"))
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return row(id, median(ours) / median(theirs), "ratio", low=min(each), high=max(each), **extra)


def spread(
    id: str, found: dict[str, list[dict[str, float]]], key: str, per: float, unit: str, **extra: Any
) -> dict[str, Any]:
    """Median, smallest and largest of ours; the median of theirs as the peer."""
    ours = [m[key] / per for m in found["ours"]]
    if "theirs" in found:
        extra["peer"] = round(median(m[key] / per for m in found["theirs"]), 4)
    return row(id, median(ours), unit, low=min(ours), high=max(ours), **extra)


# The page -------------------------------------------------------------------------------------------------------------


def write_docs(page: Path, result: dict[str, Any]) -> None:
    """Put the figures between the page's marks."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    text = "\n".join([BEGIN, *figures(result), END])
    page.write_text(head + text + rest.split(END)[1], encoding="utf-8")


def figures(result: dict[str, Any]) -> list[str]:
    rows = {row["id"]: row for row in result["rows"]}

    def cells(id: str, form: str) -> str:
        r = rows[id]
        peer = format(r["peer"], form) if "peer" in r else "–"
        return f"{r['value']:{form}} ({r['low']:{form}} to {r['high']:{form}}) | {peer}"

    machine, versions = result["hardware"], result["versions"]
    size, shard = rows["load-model-mb"]["value"] / 1000, rows["load-shard-mb"]["value"]
    return [
        f"{size:.2f} GB of bfloat16 in {NUM_SHARDS} shards of up to {shard:.0f} MB, files in the page cache, "
        f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"transformers {versions['transformers']}; median (smallest to largest) of alternating fresh processes:",
        "",
        "| | kogia | transformers |",
        "|---|---|---|",
        f"| seconds to load | {cells('load-seconds', '.2f')} |",
        f"| seconds until every page of the weights was read once | {cells('load-touched-seconds', '.2f')} |",
        f"| peak extra memory while loading, in shards | {cells('load-overhead-shards', '.3f')} |",
        f"| FP8 checkpoint to bfloat16, seconds | {cells('load-fp8-seconds', '.2f')} |",
        f"| its peak extra memory, in shards | {cells('load-fp8-overhead-shards', '.3f')} |",
        f"| FP8 kept, seconds | {cells('load-fp8-kept-seconds', '.2f')} |",
        f"| its peak extra memory, in shards | {cells('load-fp8-kept-overhead-shards', '.3f')} |",
        "",
        "Extra memory is the peak of the resident set less the model. Of transformers' share, much is pages of the "
        "mapped files, which the kernel can take back. This FP8 checkpoint it does not read "
        "here: it wants whole blocks, and V3's 576-row projection has a cut one.",
    ]


if __name__ == "__main__":
    main()
