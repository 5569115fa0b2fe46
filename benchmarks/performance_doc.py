"""Write the tables of docs/performance.md, and that of README.md, from the committed results, between their marks.

python benchmarks/performance_doc.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DOC, README = ROOT / "docs/performance.md", ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results"
LIMITS = {
    "decode-bf16-b1": 866,
    "decode-bf16-b16": 2750,
    "decode-bf16-b64": 7900,
    "decode-bf16-b256": 30000,
    "prefill-bf16": 161000,
    "prefill-bf16-8k": 150000,
}
"""Tokens/s of one H200 if nothing but its bytes (decode) or its arithmetic (prefill) took time."""
WORK = {
    "decode-bf16-b1": "decode, batch 1",
    "decode-bf16-b16": "decode, batch 16",
    "decode-bf16-b64": "decode, batch 64",
    "decode-bf16-b256": "decode, batch 256",
    "prefill-bf16": "prefill, 16 and 64 x 512",
    "prefill-bf16-8k": "prefill, 1 x 8,192",
}


def main() -> None:
    for page in (DOC, README):
        page.write_text(written(page), encoding="utf-8")


def written(page: Path) -> str:
    """The page with each table as the results have it now."""
    tables = {"speed": speed_table()} if page == README else performance_tables()
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: benchmarks/performance_doc.py -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + "\n".join([begin, *table, end]) + rest.split(end)[1]
    return text


def performance_tables() -> dict[str, list[str]]:
    return {
        "h200": engine_table("engine_gpu"),
        "alone": engine_table("engine_gpu_alone"),
        "long": long_table(),
        "ready": ready_table(),
        "load": load_table(),
        "fp8": fp8_table(),
        "h100": engine_table("engine_gpu_h100"),
        "mtp": mtp_table(),
        "kernels": kernel_table(),
        "two": two_gpu_table(),
        "packed": packed_table(),
        "training": training_table(),
        "fp8 steps": fp8_steps_table(),
        "fp8 prompts": fp8_prompts_table(),
        "cpu": cpu_table(),
        "cores": cores_table(),
        "host": host_table(),
    }


def speed_table() -> list[str]:
    """The figures that are asked for first, beside those of a peer in the same run."""
    lines = _head("work", "where", "kogia, tokens/s", "peer", "ratio")
    for name, where in (("engine_gpu", "H200"), ("engine_gpu_h100", "H100")):
        rows = results(name)
        for id in ("decode-bf16-b1", "decode-bf16-b64", "prefill-bf16"):
            row, ratio = rows[id], rows[f"{id}-vs-vllm"]["value"]
            lines.append(
                _line(WORK[id], where, f"{row['value']:,.0f}", f"vLLM 0.24: {row['peer']:,.0f}", f"{ratio:.2f}")
            )
    for file, work, size in (("training", "1b", "1.2B"), ("training_16b_layers", "16b-layers", "4.6B")):
        rows = results(file)
        ours, peer = (best(rows, f"train-{work}-{who}") for who in ("ours", "peer"))
        cells = [
            f"training, {size} parameters",
            "H200",
            f"{ours['value']:,.0f}",
            f"torchtitan 0.2.2: {peer['value']:,.0f}",
        ]
        lines.append(_line(*cells, f"{rows[f'train-{work}-ratio']['value']:.2f}"))
    for name, where in (("engine_cpu", "Zen 5, one thread"), ("engine_cpu_slow", "Zen 4, one thread")):
        rows = results(name)
        for work, ours, peer, ratio in (
            ("decode, batch 1", "bf16: decode-1", "llama bf16: decode-1", "cpu-bf16-b1-ratio"),
            ("decode, batch 8, int8", "int8: decode-8", "llama q8_0: decode-8", "cpu-int8-b8-ratio"),
        ):
            cells = [f"{rows[ours]['value']:,.0f}", f"llama.cpp: {rows[peer]['value']:,.0f}"]
            lines.append(_line(work, where, *cells, f"{rows[ratio]['value']:.2f}"))
    return lines


def best(rows: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    """The fastest variant of a kind."""
    return max(
        (row for id, row in rows.items() if id.startswith(kind) and row.get("value")), key=lambda row: row["value"]
    )


def results(name: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in _file(name)["rows"]}


def _measured(name: str) -> list[str]:
    """Of what, and when."""
    commit, _, changes = _file(name)["commit"].partition("+")
    return [f"Commit {commit[:7]}{' with changes' if changes else ''}, {_file(name)['date']}.", ""]


def _file(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def engine_table(name: str) -> list[str]:
    rows = results(name)
    has_peer = any("peer" in row and row["peer"] for row in rows.values())
    memory = rows["copy-tbps"]["value"] / results("engine_gpu")["copy-tbps"]["value"]
    more = ["vLLM 0.24", "ratio", "bar", "share of the limit"] if has_peer else ["ms a step", "of which the host"]
    lines = _measured(name) + _head("work", "tokens/s (spread)", *more)
    lines.append(_line("copy, read and written", f"{rows['copy-tbps']['value']:.2f} TB/s", *([""] * len(more))))
    for id, work in WORK.items():
        row = rows[id]
        cells = [work, f"{row['value']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"]
        if not has_peer:
            cells += [f"{row['step_ms']:.2f}", f"{row['host_ms']:.2f}"] if "step_ms" in row else ["", ""]
        else:
            ratio = rows[f"{id}-vs-vllm"]
            cells += [f"{row['peer']:,.0f}", f"{ratio['value']:.2f}", f"{ratio['limit']:.2f}"]
            limit = LIMITS[id] * (memory if id.startswith("decode") else 1)
            cells.append(f"{row['value'] / limit:.0%}")
        lines.append(_line(*cells))
    return lines


def two_gpu_table() -> list[str]:
    found = results("engine_gpu_tp")
    lines = _measured("engine_gpu_tp") + _head(
        "work", "one GPU (tokens/s)", "two, `tensor_parallel`", "ratio", "two, `expert_parallel`", "ratio"
    )
    for work, name in (("decode, batch 16", "b16"), ("decode, batch 64", "b64"), ("prefill, 32 x 512", "")):
        kind = f"decode-{{}}-{name}" if name else "prefill-{}"
        one, *both = (found[kind.format(gpus)] for gpus in ("1gpu", "2gpu-tensor", "2gpu-expert"))
        cells = [cell for two in both for cell in (_spread(two), f"{two['value'] / one['value']:.2f}")]
        lines.append(_line(work, _spread(one), *cells))
    return lines


def mtp_table() -> list[str]:
    rows = results("engine_gpu_mtp")
    lines = _measured("engine_gpu_mtp") + _head(
        "drafts", "tokens/s without", "with (spread)", "gain (spread)", "accepted", "tokens/step", "ms/step", "GB/step"
    )
    for drafts in (1, 2):
        plain, row, gain = (rows[f"{name}-b1-k{drafts}"] for name in ("decode-bf16", "mtp-bf16", "mtp-speedup"))
        spread, gains = (f"({each['low']:,.{n}f} to {each['high']:,.{n}f})" for each, n in ((row, 0), (gain, 2)))
        cells = [f"{row['acceptance']:.0%}", f"{row['tokens_per_step']:.2f}", f"{row['step_ms']:.2f}"]
        cells = [f"{row['value']:,.0f} {spread}", f"{gain['value']:.2f} {gains}", *cells]
        lines.append(_line(str(drafts), f"{plain['value']:,.0f}", *cells, f"{row['gigabytes_per_step']:.1f}"))
    return lines


def cpu_table() -> list[str]:
    """Rates of the engine on a CPU and of its peers, and the ratios that have a bar."""
    rows = results("engine_cpu")
    lines = _measured("engine_cpu")
    lines += _head("who", "decode, batch 1", "decode, batch 8", "prompt of 256 tokens")
    for who in dict.fromkeys(id.split(": ")[0] for id in rows if ": " in id):
        name = who if who.split()[0] in ("llama", "transformers") else f"kogia {who}"
        cells = [rows.get(f"{who}: {what}") for what in ("decode-1", "decode-8", "prefill")]
        lines.append(_line(name, *("" if each is None else _spread(each) for each in cells)))
    lines += ["", *_head("ratio", "value (spread)", "peer")]
    lines += [
        _line(id, f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})", f"{row.get('peer') or ''}")
        for id, row in rows.items()
        if id.startswith("cpu-")
    ]
    return lines


def host_table() -> list[str]:
    """What Python and NumPy take of a decode step, with warm caches and with cold ones."""
    rows = results("host_time")
    lines = _measured("host_time") + _head("sequences", "caches", "us a step (spread)", "us a sequence", "at 73c2a00")
    for id, row in rows.items():
        batch, *kind = id.removeprefix("host-b").split("-")
        caches = {"cold": "cold", "heard": "warm; each has a listener"}.get("".join(kind), "warm")
        spread = f"{row['value']:.0f} ({row['low']:.0f} to {row['high']:.0f})"
        lines.append(_line(batch, caches, spread, f"{row['per_row']:.2f}", f"{row['peer']:.0f}"))
    return lines


def cores_table() -> list[str]:
    """What keeping threads to cores does, on an idle machine and beside a busy program."""
    rows = results("cores")
    places = {"free": "left to the system", "kept": "kept to cores", "bound": "bound, one to a core"}
    lines = _measured("cores") + _head("threads", *places.values())
    for threads in (1, 2):
        for suffix, company in (("", ""), ("-busy", ", beside a busy program")):
            speeds = (_spread(rows[f"{threads}-{place}{suffix}"]) for place in places)
            lines.append(_line(f"{threads}{company}", *speeds))
    return lines


def _spread(row: dict[str, Any]) -> str:
    return f"{row['value']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"


def long_table() -> list[str]:
    row = results("engine_gpu_long")["decode-ctx64k-added-ms"]
    added = f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    lines = _measured("engine_gpu_long") + _head("batch 1", "ms (spread)", "bar")
    return [*lines, _line("63k more tokens of context add to a step", added, f"{row['limit']}")]


def ready_table() -> list[str]:
    """Stages of a process that has its compiled kernels on disk, and of one that has none."""
    rows = results("ready_gpu")
    later, first = rows["ready-16b-seconds"], rows["ready-16b-first-seconds"]
    stages = {"start": "start of Python, imports", "weights": "31 GB of weights", "engine": "engine and cache",
              "graphs": "kernels and graphs", "first token": "first token"}  # fmt: skip
    lines = _measured("ready_gpu") + _head("stage, seconds", "kernels on disk", "none yet")
    for stage, name in stages.items():
        lines.append(_line(name, *(f"{row['stages'][stage]:.1f}" for row in (later, first))))
    total = f"{later['value']:.1f} ({later['low']:.1f} to {later['high']:.1f})"
    return [*lines, _line("all", total, f"{first['value']:.1f}")]


def load_table() -> list[str]:
    """Requests that arrive at random, as `kogia bench --rate` reports them."""
    load = _file("engine_gpu_load")["load"]
    lines = _head("ms", "median", "90%", "99%")
    for name, key in (("to the first token", "ttft"), ("between tokens", "itl"), ("a token, over the whole", "tpot")):
        lines.append(_line(name, *(f"{load[f'{part}_{key}_ms']:.0f}" for part in ("median", "p90", "p99"))))
    return lines


def fp8_table() -> list[str]:
    """Products in FP8 beside bf16."""
    products, steps = results("training_fp8_products"), results("training_fp8")
    lines = _head("product", "bf16, TFLOP/s (spread)", "FP8 (spread)", "ratio", "commit, date")
    pairs = [("64 experts, 98,304 x 1,408 x 2,048", steps["grouped-bf16"], steps[_fastest(steps)], "training_fp8")]
    for shape in ("16384x10944x2048", "16384x2048x10944", "16384x3072x2048"):
        dense, outer = (
            [products[f"{kind}-{dtype}-{shape}"] for dtype in ("bf16", "fp8")] for kind in ("dense", "outer")
        )
        file = "training_fp8_products"
        pairs += [
            (f"dense, {shape.replace('x', ' x ')}", *dense, file),
            (f"its weight's gradient, {shape[6:]}", *outer, file),
        ]
    return lines + [
        _line(name, _spread(bf16), _spread(fp8), f"{fp8['value'] / bf16['value']:.2f}", _when(file))
        for name, bf16, fp8, file in pairs
    ]


def _when(file: str) -> str:
    return f"{_file(file)['commit'][:7]}, {_file(file)['date']}"


def _fastest(rows: dict[str, dict[str, Any]]) -> str:
    tried = [id for id in rows if re.match(r"grouped-fp8-(r\d|roles)", id)]
    return max(tried, key=lambda id: rows[id]["value"])


def kernel_table() -> list[str]:
    lines = _head("kernel", "case", "us", "TB/s", "TFLOP/s", "error", "commit, date")
    files = {"prefill": "kernels_gpu", "attention": "kernels_gpu_attention", "experts": "kernels_gpu_experts"}
    for name, file in files.items():
        for id, row in results(file).items():
            if not id.startswith(name) or not row["value"]:
                continue
            case = id.partition("-")[2]
            rates = [f"{row[k]:.2f}" if k in row else "" for k in ("tbps", "tflops")]
            error = f"{row['error']:.4f}" if "error" in row else ""
            lines.append(_line(name, case, f"{row['value']:.1f}", *rates, error, _when(file)))
    return lines


def packed_table() -> list[str]:
    """Batches of each form of the weights, beside bf16 in the same run."""
    rows = results("engine_gpu_packed")
    lines = _measured("engine_gpu_packed") + _head("weights", "batch", "tokens/s (spread)", "of bf16")
    for id, row in rows.items():
        if not id.startswith("decode-"):
            continue
        _, name, batch = id.split("-")
        ratio = row["value"] / rows[f"decode-bf16-{batch}"]["value"]
        speed = f"{row['value']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
        lines.append(_line(name, batch.removeprefix("b"), speed, f"{ratio:.2f}"))
    return lines


def training_table() -> list[str]:
    """Rates of steps beside torchtitan's and of a dense model's, and the ratios that have a bar."""
    files = {"1b": "training", "16b-layers": "training_16b_layers", "moe-tax": "training_moe_tax"}
    names = {"peer": "torchtitan 0.2.2", "ours": "kogia", "dense": "kogia, dense model"}
    lines = _head("work", "who", "sequences", "tokens/s (spread)", "peak memory (GB)", "MFU, causal", "commit, date")
    ratios = _head("ratio", "value (spread)", "bar")
    for work, file in files.items():
        commit, _, changes = _file(file)["commit"].partition("+")
        measured = f"{commit[:7]}{' with changes' if changes else ''}, {_file(file)['date']}"
        for id, row in results(file).items():
            if "memory_gb" in row:
                who, how, batch = id.removeprefix(f"train-{work}-").split("-")
                cells = [batch[1:], _spread(row), f"{row['memory_gb']:.1f}", f"{row['mfu_causal']:.0%}"]
                lines.append(_line(work, f"{names[who]}, {how}", *cells, measured))
            elif "limit" in row:
                ratios.append(_bounded(row))
    return [*lines, "", *ratios]


def fp8_steps_table() -> list[str]:
    """Steps of training in FP8 beside steps in bf16."""
    rows = results("training_fp8_steps")
    lines = _measured("training_fp8_steps") + _head(
        "model", "gradients of weights in FP8", "bf16, ms a step (spread)", "FP8 (spread)", "ratio"
    )
    shapes = {"wide": "2,048 wide, experts of 1,408", "large": "4,096 wide, experts of 2,048"}
    for shape, name in shapes.items():
        bf16 = rows[f"step-{shape}-bf16-all"]
        for kind in ("dense", "all"):
            fp8 = rows[f"step-{shape}-fp8-{kind}-all"]
            ratio = rows[f"train-fp8-ratio-{shape}-fp8-{kind}"]["value"]
            lines.append(_line(name, kind, _spread(bf16), _spread(fp8), f"{ratio:.2f}"))
    return lines


def fp8_prompts_table() -> list[str]:
    """Decoding and prompts with FP8 weights, multiplied in FP8 or made dense, beside bf16 weights in the same run."""
    rows = results("engine_gpu_packed_prefill")
    work = {"decode-{}-b64": "decode, batch 64", "decode-{}-b256": "decode, batch 256",
            "prefill-{}-16x512": "prompts, 16 x 512", "prefill-{}-1x8192": "prompts, 1 x 8,192"}  # fmt: skip
    lines = _measured("engine_gpu_packed_prefill") + _head(
        "tokens/s (spread)", "bf16 weights", "FP8, made dense", "FP8", "FP8 to bf16"
    )
    for id, name in work.items():
        each = [rows[id.format(kind)] for kind in ("bf16", "fp8-made-dense", "fp8")]
        lines.append(_line(name, *map(_spread, each), f"{each[2]['value'] / each[0]['value']:.2f}"))
    return lines


def _bounded(row: dict[str, Any]) -> str:
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if row.get("low") is not None else ""
    return _line(f"`{row['id']}`", f"{row['value']:.2f}{spread}", f"{row['limit']}")


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
