"""Everything that kogia reads, mutated: what comes of it is success or an error in words, within a limit of time.

    python tests/faults/inputs.py COUNT SEED [TARGET...]      prints what went wrong, and counts as JSON at the end

A target makes sound files once and then, for each case, a changed one, and reads it as the commands do. Cases run in
forked children that are watched: one that takes longer than its limit counts as a hang, one that dies or raises
anything but an error that the command line would show in the project's own words as a traceback.
"""

import contextlib
import gc
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

CHUNK = 100
"""Cases per child."""
MEMORY_BYTES = 8 << 30
"""Of address space that a child may take above what it begins with."""
Case = Callable[[], object]
"""Reads one input."""
Maker = Callable[[Path], Callable[[random.Random], Case]]
"""From a folder of its own to what makes a case."""
TARGETS: dict[str, "Target"] = {}


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    make: Maker
    share: int
    """Of a thousand cases."""
    seconds: float
    """What one case may take."""


@dataclass
class Found:
    """What became of the cases of a target."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0


def target(share: int, seconds: float = 20.0) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        TARGETS[make.__name__] = Target(make, share, seconds)
        return make

    return register


# Running --------------------------------------------------------------------------------------------------------------


def run(
    name: str, count: int, seed: int, place: Path, on_progress: Callable[[int], object] = lambda _: None, start: int = 0
) -> Found:
    """Cases number `start` to `count` of a target, in children. The files are in a folder below `place`."""
    found, chosen = Found(), TARGETS[name]
    while start < count:
        folder = Path(tempfile.mkdtemp(prefix=name, dir=place))
        stop = min(count, start + CHUNK)
        start = _watch(name, chosen, start, stop, seed, folder, found)
        shutil.rmtree(folder, ignore_errors=True)
        on_progress(start)
    return found


def _watch(name: str, chosen: Target, start: int, stop: int, seed: int, folder: Path, found: Found) -> int:
    """Run cases in a child until they are done or one of them ends it; returns the number of the next case."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _child(chosen, name, start, stop, seed, folder, theirs)
    os.close(theirs)
    case, lines, ending = start - 1, _Lines(ours), ""
    while True:
        line = lines.next(chosen.seconds + (60.0 if case < start else 0.0))
        if line is None:
            ending = "hang"
            os.killpg(pid, signal.SIGKILL)
            break
        if not line:
            break
        if "begin" in (event := json.loads(line)):
            case = event["begin"]
            continue
        if event["end"] < 0:
            raise RuntimeError(event["words"])
        found.counts[event["kind"]] += 1
        found.slowest = max(found.slowest, event["seconds"])
        if event["kind"] not in ("read", "refused"):
            found.faults.append(f"{name} {seed} {event['end']}: {event['kind']}: {event['words']}")
    _, status = os.waitpid(pid, 0)
    os.close(ours)
    if not ending and status == 0:
        return stop
    found.counts[ending or "traceback"] += 1
    how = "took too long" if ending else f"the process ended with {os.waitstatus_to_exitcode(status)}"
    found.faults.append(f"{name} {seed} {case}: {ending or 'traceback'}: {how}")
    return case + 1


class _Lines:
    """Lines from a pipe, each waited for no longer than asked."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._rest = descriptor, b""

    def next(self, seconds: float) -> bytes | None:
        """A line; empty at the end, None where none came in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            if not select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(self._descriptor, 1 << 16)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


def _child(chosen: Target, name: str, start: int, stop: int, seed: int, folder: Path, pipe: int) -> None:
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        os.chdir(folder)
        make = chosen.make(folder)
        for number in range(start, stop):
            case = make(random.Random(f"{name} {seed} {number}"))
            os.write(pipe, json.dumps({"begin": number}).encode() + b"\n")
            began = time.monotonic()
            kind, words = outcome(case)
            event = {"end": number, "kind": kind, "words": words[-3000:], "seconds": time.monotonic() - began}
            os.write(pipe, json.dumps(event).encode() + b"\n")
        status = 0
    except BaseException:  # noqa: BLE001 - a target that cannot make its case
        words = f"the campaign itself: {traceback.format_exc()}"
        event = {"end": -1, "kind": "traceback", "words": words[-3000:], "seconds": 0.0}
        os.write(pipe, json.dumps(event).encode() + b"\n")
    finally:
        os._exit(status)


def outcome(case: Case) -> tuple[str, str]:
    """("read" | "refused" | "traceback" | "hang", words), judged as the command line would show it."""
    from kogia.cli import _origin

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            case()
    except (ValueError, OSError, FloatingPointError) as error:
        if _origin(error):
            return "traceback", f"not in our own words: {traceback.format_exc()}"
        return "refused", str(error)
    except SystemExit as error:
        return ("refused", "") if error.code in (0, 2) else ("traceback", f"exit {error.code}")
    except TooSlow as error:
        return "hang", str(error)
    except BaseException:  # noqa: BLE001 - that is what is looked for
        return "traceback", traceback.format_exc()
    return "read", ""


class TooSlow(Exception):
    """A part of a case took longer than its own limit, which is below that of the case."""


# Model directories ----------------------------------------------------------------------------------------------------


@target(share=150)
def configs(folder: Path) -> Callable[[random.Random], Case]:
    """config.json of every format: loaded, run and inspected."""
    from checkpoint import fuzz

    places = {kind: fuzz.written(folder, kind) for kind in fuzz.KINDS}
    texts = {kind: (place / "config.json").read_text() for kind, place in places.items()}

    def make(draw: random.Random) -> Case:
        kind = draw.choice(sorted(places))
        data = fuzz.mutated(json.loads(texts[kind]), draw)
        (places[kind] / "config.json").write_text(json.dumps(data))
        return lambda: _load_and_inspect(places[kind])

    return make


def _load_and_inspect(place: Path) -> None:
    from checkpoint import fuzz

    from kogia.checkpoint.inspect import inspect_model

    loaded = inspected = None
    try:
        fuzz._run(place)
    except (ValueError, OSError) as error:
        loaded = error
    try:
        inspect_model(str(place))
    except (ValueError, OSError) as error:
        inspected = error
    for error in (loaded, inspected):
        if error is not None:
            raise error


@target(share=140)
def weights(folder: Path) -> Callable[[random.Random], Case]:
    """Headers and index of weight files: loaded, inspected, and planned to be converted."""
    from checkpoint import fuzz

    from kogia.checkpoint.convert import convert, plan

    whole = fuzz.written(folder, "deepseek_v3")
    shards = convert(whole, folder / "shards", max_shard_bytes=20_000)
    packed = convert(whole, folder / "packed", dtype="fp8", max_shard_bytes=0)
    originals = {
        path: path.read_bytes()
        for place in (whole, shards, packed)
        for path in place.glob("*")
        if ".json" not in path.name
    } | {shards / "model.safetensors.index.json": (shards / "model.safetensors.index.json").read_bytes()}

    def make(draw: random.Random) -> Case:
        path = draw.choice(sorted(originals))
        data = originals[path]
        path.write_bytes(_changed_index(data, draw) if path.suffix == ".json" else _changed_weights(data, draw))

        def case() -> None:
            try:
                _load_and_inspect(path.parent)
                plan(path.parent, "bfloat16")
            finally:
                path.write_bytes(data)

        return case

    return make


def _changed_index(data: bytes, draw: random.Random) -> bytes:
    from faults.mutate import as_file, mutated, mutated_bytes

    return mutated_bytes(data, draw) if draw.random() < 0.4 else as_file(mutated(json.loads(data), draw), draw)


def _changed_weights(data: bytes, draw: random.Random) -> bytes:
    """The whole file, the length, the data or the header changed; a changed header's length is mostly right."""
    from faults.mutate import as_file, mutated, mutated_bytes

    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    match draw.randrange(5):
        case 0:
            return mutated_bytes(data, draw)
        case 1:
            length = draw.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
            return length.to_bytes(8, "little") + header + rest
        case 2:
            return data[:8] + header + draw.choice((b"", rest[:-1], rest + b"\0", rest[::-1]))
        case 3:
            header = mutated_bytes(header, draw)
        case _:
            header = as_file(mutated(json.loads(header), draw), draw)
    return (len(header) if draw.random() < 0.8 else size).to_bytes(8, "little") + header + rest


@target(share=80)
def ggufs(folder: Path) -> Callable[[random.Random], Case]:
    """GGUF files: opened, run, inspected, their tokenizer used, and planned to be written again."""
    from checkpoint import gguf_files

    from kogia.checkpoint.gguf_write import plan_gguf
    from kogia.checkpoint.hf import read_stored
    from kogia.checkpoint.inspect import inspect_model
    from kogia.checkpoint.open import open_model
    from kogia.model.packed import pack

    kinds = {"llama": "q8_0", "qwen3moe": "f16", "deepseek-v3": "f32", "llama-3.2": "bf16"}
    files = [gguf_files.write_gguf_model(folder, name, kind) for name, kind in kinds.items()]
    originals = {file: (file.read_bytes(), gguf_files.read_entries(file)) for file in files}
    changed = folder / "changed.gguf"

    def case() -> None:
        opened = None
        try:
            inspect_model(str(changed))
        finally:
            opened = open_model(changed, device="cpu")
        opened.model.logprobs(pack([[1, 2, 3], [4, 5]]))
        ids = [opened.tokenizer.encode(text) for text in TEXTS]
        _ = [opened.tokenizer.decode(each) for each in ids], opened.tokenizer.template_source
        plan_gguf(read_stored(changed), "q8_0")

    def make(draw: random.Random) -> Case:
        data, (metadata, tensors) = originals[draw.choice(files)]
        if draw.random() < 0.6:
            changed.write_bytes(_changed_header(data, draw))
        else:
            gguf_files.write_entries(changed, _changed_metadata(metadata, draw), tensors)
        return case

    return make


def _changed_header(data: bytes, draw: random.Random) -> bytes:
    """Any bytes, or a number of the header's, lengths and counts among them."""
    from faults.mutate import mutated_bytes

    if draw.random() < 0.4:
        return mutated_bytes(data, draw)
    size, numbers = draw.choice((4, 8)), (0, 1, 2, 3, 7, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
    at = draw.choice((8, 16, 24, draw.randrange(300), draw.randrange(len(data) // 4)))
    return data[:at] + (draw.choice(numbers) % 256**size).to_bytes(size, "little") + data[at + size :]


def _changed_metadata(metadata: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Entries with odd values of the types that the format has, or missing."""
    odd = (0, 1, 2, 7, 100_000, 2**31 - 1, 2**32 - 1, -1.5, 0.0, 1e30, float("nan"), "", "x", "\x1b[2J", True, False)
    lists = ([1], ["a"], ["a", "a"], [0.5] * 40, [3] * 460)
    changed = dict(metadata)
    for name in draw.sample(sorted(changed.keys() - {"general.architecture"}), draw.randint(1, 3)):
        if draw.random() < 0.2:
            del changed[name]
        elif isinstance(changed[name], list) and draw.random() < 0.7:
            items = list(changed[name])
            alike = [item for item in odd if type(item) is type(items[0]) and item != 2**32 - 1]  # int32 in lists
            items[draw.randrange(len(items))] = draw.choice(alike)
            changed[name] = draw.choice((items, items[1:], items + items))
        else:
            changed[name] = draw.choice((*odd, *lists))
    if draw.random() < 0.1:
        changed["general.architecture"] = draw.choice(("llama", "qwen2", "qwen3", "deepseek2", "gemma3", "\x9b"))
    return changed


# Tokenizers and templates ---------------------------------------------------------------------------------------------

TEXTS = ("", "hi <think>\n12,345 + 6\n</think>\n\n你好 🐋 naïve", "a" * 300, " \n\t " * 50, "<｜User｜><|im_end|></s>")


def _families(folder: Path) -> list[Path]:
    import tokenizer_families as families

    from kogia.text.tokenizer import train_bpe

    train_bpe(families.CORPUS, 300).save(folder / "own")
    written = [families.write_deepseek(folder / "deepseek"), families.write_qwen(folder / "qwen")]
    written += [families.write_llama3(folder / "llama3"), families.write_llama2(folder / "llama2")]
    return [folder / "own", *written]


@target(share=180)
def tokenizers(folder: Path) -> Callable[[random.Random], Case]:
    """The files of a tokenizer: loaded, and used on several texts."""
    from faults.mutate import as_file, mutated, mutated_bytes

    places = _families(folder)
    for place in places:
        (place / "special_tokens_map.json").write_text(
            '{"eos_token": {"content": "x"}, "additional_special_tokens": []}'
        )
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    files = [place / name for place in places for name in names if (place / name).exists()]
    originals = {file: file.read_bytes() for file in files}

    def make(draw: random.Random) -> Case:
        file = draw.choice(files)
        data = originals[file]
        if draw.random() < 0.15:
            file.write_bytes(mutated_bytes(data, draw))
        else:
            value = json.loads(data)
            if file.name == "tokenizer.json" and draw.random() < 0.7:  # the vocabulary would be most of what is hit
                part = draw.choice([key for key in value if key not in ("model", "version")])
                value[part] = mutated(value[part], draw)
            else:
                value = mutated(value, draw)
            file.write_bytes(as_file(value, draw))

        def case() -> None:
            try:
                _use_tokenizer(file.parent)
            finally:
                file.write_bytes(data)

        return case

    return make


def _use_tokenizer(place: Path) -> None:
    from kogia.text.stream import IncrementalDecoder
    from kogia.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(place)
    ids = [tokenizer.encode(text) for text in TEXTS]
    tokenizer.encode_documents(TEXTS)
    decoder = IncrementalDecoder(tokenizer)
    for each in (*ids, [0, tokenizer.vocab_size - 1, tokenizer.vocab_size + 5]):
        tokenizer.decode(each)
        decoder.push(each)
    decoder.flush()
    _ = tokenizer.special_ids, tokenizer.adds_bos, tokenizer.template_source, tokenizer.encode_raw("x")
    tokenizer.save(place / "again")
    Tokenizer.load(place / "again")


@target(share=12, seconds=40.0)
def templates(folder: Path) -> Callable[[random.Random], Case]:
    """Chat templates with changed pieces, rendered in their process."""
    import tokenizer_families as families

    from faults.mutate import mutated_bytes
    from kogia.text.chat import Message, render_prompt
    from kogia.text.tokenizer import Tokenizer

    place = families.write_qwen(folder / "model", None)
    sources = (families.R1, families.V31, families.QWEN25, families.QWEN3, families.LLAMA3, families.LLAMA2)
    odd = (
        "{% for a in range(10**9) %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ messages.__class__ }}", "{{ x.y.z }}",
        "{{ raise_exception('no') }}", "{{ [1][5] }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{{ messages[99].content }}",
        "{{ lipsum(9) }}", "{{ namespace(_x=1) }}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "\x00", "{#",
        "{%",
    )  # fmt: skip
    talk = (
        Message("system", "be brief"),
        Message("user", "1+1"),
        Message("assistant", "x</think>2"),
        Message("user", "2"),
    )

    def make(draw: random.Random) -> Case:
        source = draw.choice(sources)
        if draw.random() < 0.5:
            at = draw.randint(0, len(source))
            source = source[:at] + draw.choice(odd) + source[at:]
        else:
            source = mutated_bytes(source.encode(), draw).decode("utf-8", "replace")
        (place / "chat_template.jinja").write_text(source, encoding="utf-8")
        return lambda: render_prompt(draw.choice((talk, talk[1:2])), Tokenizer.load(place))

    return make


# Data, recipes, flags -------------------------------------------------------------------------------------------------

ROWS: list[Any] = [
    {"text": "1 + 1 = 2"},
    {"prompt": "q", "completion": "t</think>a"},
    {"prompt": "q", "completion": "a", "reasoning": "why", "system": "s"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "c", "reasoning": "why"}]},
    {"messages": [{"role": "user", "content": "hi"}], "completion": "t</think>b"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "c"}]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
]


@target(share=300)
def rows(folder: Path) -> Callable[[random.Random], Case]:
    """Rows and files of data, read and tokenised as training does, and read as prompts."""
    import gzip
    from importlib.util import find_spec

    import tokenizer_families as families

    from faults.mutate import as_file, mutated, mutated_bytes
    from kogia.text.tokenizer import train_bpe

    tokenizer = train_bpe(families.CORPUS, 300)
    kinds = ["jsonl", "json", "txt", "jsonl.gz", "json.gz", "txt.gz"] + ["parquet"] * bool(find_spec("pyarrow"))

    def make(draw: random.Random) -> Case:
        kind = draw.choice(kinds)
        chosen = [mutated(row, draw) if draw.random() < 0.6 else row for row in draw.choices(ROWS, k=3)]
        file = folder / f"rows.{kind}"
        if kind == "parquet":
            data = mutated_bytes(_parquet(file), draw)
        elif kind.startswith("jsonl"):
            data = b"\n".join(as_file(row, draw).replace(b"\n", b" ") for row in chosen) + b"\n"
        else:
            data = as_file(chosen, draw)
        if kind.endswith(".gz"):
            data = gzip.compress(data, mtime=0)
            data = mutated_bytes(data, draw) if draw.random() < 0.3 else data
        file.write_bytes(data)
        return lambda: _read_data(file, tokenizer, prompts=draw.random() < 0.3)

    return make


def _parquet(file: Path) -> bytes:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "q", "completion": "a"}] * 5), file)
    return file.read_bytes()


def _read_data(file: Path, tokenizer: Any, *, prompts: bool) -> None:
    from kogia.data.config import SourceConfig
    from kogia.data.shards import tokenise
    from kogia.data.sources import read_source
    from kogia.inference.config import GenerateConfig
    from kogia.inference.prompts import read_prompts
    from kogia.text.chat import render_prompt

    if prompts:
        for question in read_prompts(GenerateConfig("model", file=str(file))):
            render_prompt(question.messages("system"), tokenizer)
        return
    list(tokenise(read_source(SourceConfig(str(file))), tokenizer))


def _configurations() -> dict[str, Any]:
    from kogia.cli import COMMANDS
    from kogia.config import resolve

    return {name: resolve(command.config) for name, command in COMMANDS.items()}


SOUND = {
    "pretrain": {"out": "runs/x", "steps": 2, "model": {"dim": 16, "num_layers": 2, "moe": {"num_experts": 4}}},
    "sft": {"init": "model", "out": "runs/x", "epochs": 1.0, "data": {"sources": [{"spec": "a.jsonl", "num": 3}]}},
    "distill": {"model": {"preset": "deepseek-v3"}, "out": "runs/x", "steps": 2, "optim": {"betas": [0.9, 0.95]}},
    "prepare": {"out": "a", "vocab_size": 300, "sources": [{"spec": "a.jsonl", "weight": 2.0}], "against": ["gsm8k"]},
    "rl": {
        "init": "model",
        "tasks": ["countdown"],
        "task_options": {"countdown": {"numbers": 4}},
        "loss": {"kl_coef": 1},
    },
    "curate": {"path": "model", "out": "a.jsonl", "engine": {"num_blocks": 5, "rank_by_context": [[0, 8], [9, 4]]}},
    "eval": {"path": "model", "tasks": ["countdown"], "k": [1, 4], "num_samples": 4, "engine": {"prefix_cache": False}},
    "generate": {"path": "model", "prompt": ["a"], "stop": ["x"], "temperature": 0.5, "top_p": 0.9},
    "chat": {"path": "model", "top_k": 3, "draft_tokens": 1},
    "convert": {"src": "a", "dst": "b", "dtype": "bf16", "shard_gib": 1.0},
    "inspect": {"model": "deepseek-v3", "context": 10},
    "report": {"path": "runs/x", "out": "a.html"},
    "demo": {"out": "runs/demo", "scale": 0.5, "seed": 1},
}


@target(share=200)
def recipes(folder: Path) -> Callable[[random.Random], Case]:
    """Recipes as values and as files, written back and read again where they are sound."""
    import tomli_w

    from faults.mutate import mutated, mutated_bytes
    from kogia.config import from_dict, load_toml, to_dict

    classes = _configurations()

    def make(draw: random.Random) -> Case:
        name = draw.choice(sorted(SOUND))
        values = mutated(SOUND[name], draw)
        file = folder / "recipe.toml"

        def case() -> None:
            if draw.random() < 0.6:
                config = from_dict(classes[name], values)
                assert from_dict(classes[name], to_dict(config)) == config
                return
            data = mutated_bytes(tomli_w.dumps(SOUND[name]).encode(), draw)
            file.write_bytes(data)
            load_toml(file, classes[name])

        return case

    return make


@target(share=30)
def flags(folder: Path) -> Callable[[random.Random], Case]:
    """The command line: flags with odd values, unknown ones, recipes, and dry runs of what was understood."""
    import tomli_w

    from faults.mutate import ODD, mutated
    from kogia.cli import _run
    from kogia.config import to_dict

    classes = _configurations()
    names = {name: list(_flags(cls)) for name, cls in classes.items()}
    values = [str(item) for item in ODD if len(str(item)) < 100 and "\x00" not in str(item)] + ["3", "0.5", "countdown"]
    _ = to_dict

    def make(draw: random.Random) -> Case:
        name = draw.choice(sorted(SOUND))
        words = [name]
        if draw.random() < 0.4:
            with contextlib.suppress(TypeError, ValueError):  # what TOML cannot write
                (folder / "recipe.toml").write_text(tomli_w.dumps(mutated(SOUND[name], draw, 1)))
                words.append("recipe.toml")
        elif "path" in SOUND[name] or "src" in SOUND[name]:
            words += ["model"] * draw.randint(0, 2)
        for _ in range(draw.randint(0, 4)):
            flag = draw.choice(names[name])
            words += [draw.choice((f"--{flag}", f"--{flag}", f"--{flag}x", f"--no-{flag}", f"--{flag}.a"))]
            words += [draw.choice(values)] * draw.choice((0, 1, 1, 1, 2))
        if name in ("chat", "report", "inspect", "generate"):
            words += ["--help"] if draw.random() < 0.1 else []
        else:
            words += ["--dry-run"]
        return lambda: _run([word.encode("utf-8", "replace").decode() for word in words])

    return make


def _flags(cls: Any, before: str = "") -> Iterator[str]:
    import dataclasses
    import typing

    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        if each.name == "_":
            continue
        name = f"{before}{each.name.replace('_', '-')}"
        yield name
        for inner in (hints[each.name], *typing.get_args(hints[each.name])):
            if dataclasses.is_dataclass(inner):
                yield from _flags(inner, f"{name}.")


# Sampling and answers -------------------------------------------------------------------------------------------------


@target(share=20)
def sampling(folder: Path) -> Callable[[random.Random], Case]:
    """Sampling parameters of any kind beside a sound request, whose tokens must be those that it has alone."""
    from tiny_checkpoint import save_tiny_checkpoint

    from faults.mutate import ODD
    from kogia.checkpoint.open import open_model
    from kogia.engine.config import EngineConfig
    from kogia.engine.engine import Engine
    from kogia.engine.request import SamplingParams

    model, tokenizer, _ = open_model(save_tiny_checkpoint(folder / "model"), device="cpu")
    engine = Engine(model, tokenizer, EngineConfig(num_blocks=300, block_size=4, max_sequences=16))
    sound = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
    prompt = tokenizer.encode("say 1")
    alone = engine.generate([prompt], sound)[0][0].token_ids
    odd = [*ODD, (), ("",), ("a",), ("a", 1), (1, 2), (2**70,), (-1,), (3.5,), 1e-30, 1e-31, 0.999, 3, 20, 2**31 - 1]
    names = ("temperature", "max_tokens", "seed", "top_k", "top_p", "min_p", "n", "stop", "stop_token_ids")

    def make(draw: random.Random) -> Case:
        chosen = draw.sample((*names, "ignore_eos", "logprobs"), k=draw.randint(1, 3))
        values = {name: draw.choice(odd) for name in chosen}
        if isinstance(values.get("n"), int) and values["n"] > 50:
            values["n"] = 10**6 + values["n"]  # a million sequences are a wish, not a mistake
        asked = draw.choice((prompt, [], [0], [-1], [10**9], prompt * 40, prompt[:1]))

        def case() -> None:
            refusal = None
            try:
                groups = engine.generate([prompt, asked], [sound, SamplingParams(**values)])
                assert groups[0][0].token_ids == alone, "a neighbour's tokens changed"
            except ValueError as error:
                refusal = error
            assert engine.num_unfinished == 0, "something is left in the engine"
            assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks, "blocks are lost"
            assert engine.scheduler.table.num_rows_free == engine.config.max_sequences, "rows are lost"
            if refusal is not None:
                assert engine.generate([prompt], sound)[0][0].token_ids == alone, "the engine is not what it was"
                raise refusal

        return case

    return make


GOLDS = ("5", "-3.5", "1/2", "\\frac{1}{2}", "(1,2)", "x+1", "[0,1)", "\\{1,2\\}", "3:15 PM", "A", "1,234", "x \\geq 5")


@target(share=60)
def answers(folder: Path) -> Callable[[random.Random], Case]:
    """Answers for every verifier, judged in their processes as every command does."""
    from faults.mutate import text_of_fragments
    from kogia.tasks.pool import VerifyPool
    from kogia.tasks.task import Problem, Response, Verdict

    (folder / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "#### 5"}) + "\n")
    options: dict[str, dict[str, Any]] = {"countdown": {}, "arithmetic": {}, "gsm8k": {"path": str(folder)}}
    data: dict[str, Callable[[random.Random], dict[str, Any]]] = {
        "countdown": lambda _: {"numbers": [1, 7, 7], "target": 15},
        "arithmetic": lambda _: {"answer": 15},
        "gsm8k": lambda draw: {"answer": draw.choice(GOLDS) if draw.random() < 0.8 else text_of_fragments(draw, 8)},
    }
    pools = {spec: VerifyPool(spec, options[spec], workers=1, timeout=5.0) for spec in options}

    def make(draw: random.Random) -> Case:
        spec = draw.choice(sorted(pools))
        text = draw.choice(("", "thought</think>", "</think>")) + text_of_fragments(draw)
        text = text.encode("utf-8", "replace").decode()  # what decoding tokens can give
        problem = Problem("p", (), data[spec](draw))

        def case() -> Verdict:
            (verdict,) = pools[spec].verify_all([(problem, Response(text, 5, draw.random() < 0.1))])
            assert verdict.status not in ("error",), f"{verdict.detail}: {text!r} for {problem.data}"
            return verdict

        return case

    return make


SCAN_CHARACTERS = 60_000
SCAN_SECONDS = 3.0
"""Of computing, for a text of so many characters in one scanner: some 0.1 s if it is linear."""


@target(share=15, seconds=120.0)
def scans(folder: Path) -> Callable[[random.Random], Case]:
    """Long texts of repeated pieces through everything that looks for something in a completion."""
    from faults.mutate import repeated
    from kogia.engine.output import printable
    from kogia.tasks.answers import answers_match, extract_answer, parse_number
    from kogia.tasks.arithmetic import Arithmetic
    from kogia.tasks.countdown import Countdown
    from kogia.tasks.format import answer_text, gives_up, language_consistency, think_format
    from kogia.tasks.task import Problem, Response
    from kogia.text.chat import Prompt, canonical_reply, parse_response

    arithmetic, countdown = Arithmetic(), Countdown()
    problem = Problem("p", (), {"numbers": [1, 7, 7], "target": 15, "answer": 15})
    scanners: dict[str, Callable[[str], object]] = {
        "extract_answer": extract_answer,
        "answers_match": lambda text: answers_match("5", text),
        "answers_match, gold": lambda text: answers_match(text, "5"),
        "parse_number": parse_number,
        "answer_text": answer_text,
        "gives_up": gives_up,
        "think_format": think_format,
        "language_consistency": language_consistency,
        "parse_response": parse_response,
        "canonical": Prompt([], opens_thought=False).canonical,
        "own": Prompt([], opens_thought=False).own,
        "canonical_reply": lambda text: canonical_reply(text, None),
        "arithmetic": lambda text: arithmetic.verify(problem, Response(text, 9, truncated=False)),
        "countdown": lambda text: countdown.verify(problem, Response(text, 9, truncated=False)),
        "printable": printable,
    }

    def make(draw: random.Random) -> Case:
        text = repeated(draw, SCAN_CHARACTERS)

        def case() -> None:
            for name, scan in scanners.items():
                began = time.process_time()
                scan(text)
                if (took := time.process_time() - began) > SCAN_SECONDS:
                    raise TooSlow(f"{name} took {took:.1f} s for {text[:60]!r}...")

        return case

    return make


@target(share=20)
def verdicts(folder: Path) -> Callable[[random.Random], Case]:
    """What a worker may answer."""
    from faults.mutate import mutated
    from kogia.tasks.worker import read_verdict

    sound = {"reward": 1.0, "correct": True, "status": "ok", "parts": {"a": 1.0}, "extracted": "5", "detail": ""}
    return lambda draw: lambda values=mutated(sound, draw): read_verdict(values)


# What commands left behind --------------------------------------------------------------------------------------------

SUMMARY = {
    "name": "heldout", "task": "countdown", "checkpoint": "base", "split": "test", "num_questions": 2, "num_samples": 2,
    "sampling": {"temperature": 1.0, "max_tokens": 8, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "pass@1": [0.5, 0.4, 0.6], "pass@2": [0.6, 0.5, 0.7], "maj@2": [0.6, 0.5, 0.7], "greedy": [0.5, 0.1, 0.9],
    "think_tokens": 3.5, "reward": 0.1,
    "completion_tokens": 5.0, "truncated": 0.1, "parse_fail": 0.0, "give_up": 0.0, "false_claim": 0.5, "seconds": 1.0,
    "claims_verified": 0.5, "status_counts": {"ok": 2, "wrong": 2}, "mtp_acceptance": None,
}  # fmt: skip
SAMPLE = {
    "problem_id": "p1", "prompt": "q", "sample": 0, "text": "x</think>5", "num_tokens": 5, "think_tokens": 2,
    "reward": 1.0, "correct": True, "status": "ok", "parts": {"accuracy": 1.0}, "extracted": "5", "detail": "",
    "truncated": False,
}  # fmt: skip


@target(share=25)
def reports(folder: Path) -> Callable[[random.Random], Case]:
    """A directory of runs, of which any file is changed: a page all the same."""
    from faults.mutate import as_file, mutated, mutated_bytes
    from kogia.report.build import render
    from kogia.report.load import load_run, read_samples
    from kogia.report.words import before_and_after, explain_change, explain_student, grouped, headline_group

    metric = {"step": 1, "seconds": 1.5, "loss": 2.0, "reward": 0.1, "val_loss": 2.5, "max_vio": 0.1}
    for name in ("cold_start", "grpo"):
        (folder / "runs" / name / "evals").mkdir(parents=True)
    texts = {}
    for name in ("cold_start", "grpo"):
        run_dir = folder / "runs" / name
        texts[run_dir / "run.toml"] = b'out = "x"\n'
        texts[run_dir / "metrics.jsonl"] = b"".join(json.dumps(metric | {"step": i}).encode() + b"\n" for i in range(3))
        texts[run_dir / "evals" / "heldout.json"] = json.dumps(SUMMARY | {"checkpoint": name}).encode()
        texts[run_dir / "evals" / "heldout.jsonl"] = json.dumps(SAMPLE).encode() + b"\n"
    texts[folder / "runs" / "summary.json"] = json.dumps(
        {"seconds": 9, "peak_memory_bytes": 2**30, "seed": 7, "stages": [SUMMARY], "versions": {"torch": "2"}}
    ).encode()

    def changed(data: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.2:
            return mutated_bytes(data, draw)
        try:
            return b"\n".join(as_file(mutated(json.loads(line), draw), draw) for line in data.splitlines())
        except ValueError:
            return mutated_bytes(data, draw)

    def make(draw: random.Random) -> Case:
        for path, data in texts.items():
            path.write_bytes(changed(data, draw) if draw.random() < 0.35 else data)

        def case() -> None:
            found = load_run(folder / "runs")
            group = headline_group(found.stages)
            pair = before_and_after(found.stages, group)
            _ = grouped(found.stages), explain_change(*pair, group) if pair else None, explain_student(group)
            for stage in found.stages:
                for measurement in stage.measurements:
                    list(read_samples(measurement.samples))
            if draw.random() < 0.04:
                render(found)

        return case

    return make


@target(share=90)
def remains(folder: Path) -> Callable[[random.Random], Case]:
    """Files that a command left and another goes on with: evaluations, partial samples, curations, logs, stages."""
    from faults.mutate import as_file, mutated, mutated_bytes

    settings = {"num_samples": 2, "task": "countdown"}
    second = SAMPLE | {"sample": 1, "correct": False, "status": "wrong", "extracted": None}
    greedy = SAMPLE | {"sample": -1}
    curated = {"id": "p1#0", "task": "countdown", "problem_id": "p1", "completion": "x", "reward": 1.0, "num_tokens": 3}
    progress = {
        "task": "countdown", "problem_id": "p1", "samples": 2, "correct": 1, "kept": 1, "kept_tokens": 3,
        "statuses": {"ok": 1}, "dropped": {},
    }  # fmt: skip
    stages = {"settings": {"seed": 0, "scale": 1.0}, "base": {"seconds": 1.0, "done": True}, "peak_memory_bytes": 5}
    sound: dict[str, list[Any]] = {
        "heldout.json": [SUMMARY | {"settings": settings}],
        "heldout.jsonl": [SAMPLE, second, greedy],
        "heldout.partial.jsonl": [SAMPLE, second, greedy],
        "heldout.partial.settings": [settings],
        "kept.jsonl": [curated],
        "kept.progress.jsonl": [{"settings": {"path": "model", "out": "kept.jsonl"}}, progress],
        "texts.jsonl": [{"prompt": "a", "index": 0, "text": "x"}, {"prompt": "a", "index": 1, "text": "y"}],
        "texts.jsonl.unfinished": [{"settings": settings}, {"place": 2, "rows": [{"index": 0}, {"index": 1}]}],
        "metrics.jsonl": [{"step": 1, "seconds": 1.0, "loss": 1.0}, {"step": 2, "seconds": 2.0, "val_loss": 1.0}],
        "stages.json": [stages],
    }
    cases = {
        "heldout.j": _compare,
        "heldout.p": _take_up,
        "kept": _curate,
        "texts": _write_rows,
        "metrics": _logs,
        "stages": _stages,
    }

    def make(draw: random.Random) -> Case:
        name = draw.choice(sorted(sound))
        for each, values in sound.items():
            data = b"".join(json.dumps(value).encode() + b"\n" for value in values)
            if each == name and draw.random() < 0.2:
                data = mutated_bytes(data, draw)
            elif each == name:
                data = b"\n".join(as_file(mutated(value, draw), draw) for value in values) + b"\n"
            (folder / each).write_bytes(data)
        (case,) = (run for start, run in cases.items() if name.startswith(start))
        return lambda: case(folder, settings)

    return make


def _compare(folder: Path, settings: dict[str, Any]) -> None:
    from kogia.eval.config import EvalConfig
    from kogia.eval.earlier import Earlier
    from kogia.eval.partial import SampleFiles
    from kogia.eval.summary import compare, summarise
    from kogia.tasks.task import Problem
    from kogia.text.chat import Message

    earlier = Earlier.read(folder / "heldout.json", "heldout.json")
    earlier.check(EvalConfig("model", max_tokens=8, num_samples=2), [Problem("p1", (Message("user", "q"),))])
    compare(earlier.samples, [SAMPLE, SAMPLE | {"sample": -1}])
    for name in ("heldout.partial.jsonl", "heldout.partial.settings"):
        (folder / name).unlink()
    files = SampleFiles(folder, "heldout", settings)
    with files.hold():
        if (finished := files.finished()) is not None:
            summarise(finished[1], (1, 2))


def _take_up(folder: Path, settings: dict[str, Any]) -> None:
    from kogia.eval.partial import SampleFiles
    from kogia.eval.summary import summarise

    files = SampleFiles(folder, "heldout", settings)
    with files.hold():
        files.finished()
        kept = files.begin(resume=True)
        if kept:
            files.finish(summarise(kept, (1, 2)))


def _curate(folder: Path, settings: dict[str, Any]) -> None:
    from kogia.rl.config import CurateConfig
    from kogia.rl.curate import Record

    record = Record(CurateConfig("model", out="kept.jsonl"))
    try:
        record.summary("model", 1.0)
    finally:
        record.close()


def _write_rows(folder: Path, settings: dict[str, Any]) -> None:
    from kogia.inference.row_file import open_rows

    with open_rows("texts.jsonl", settings, num_prompts=3, per_prompt=2, resume=True) as rows:
        for place in rows.left:
            rows.add(place, [{"index": 0, "text": "\ud800"}, {"index": 1}])
        rows.finish()


def _logs(folder: Path, settings: dict[str, Any]) -> None:
    from kogia import log
    from kogia.train.run_dir import was_measured

    log.read_metrics(folder)
    was_measured(folder, 2, "val_loss")
    with log.MetricLog(folder, total_steps=4, description="x", quiet=True, resume_step=2) as metrics:
        metrics.log(3, {"loss": 1.0})


def _stages(folder: Path, settings: dict[str, Any]) -> None:
    from kogia.demo.config import DemoConfig
    from kogia.demo.run import Stages, stored_state

    stages = Stages(folder, stored_state(DemoConfig(out=str(folder))))
    stages.run("base", lambda: None)
    _ = stages.seconds


@target(share=40)
def checkpoints(folder: Path) -> Callable[[random.Random], Case]:
    """A run directory that is resumed: settings, state, optimiser, tokens and their meta files."""
    from faults.kills import PRETRAIN
    from faults.mutate import as_file, mutated, mutated_bytes
    from kogia.config import load_toml
    from kogia.train.config import SupervisedConfig
    from kogia.train.run_dir import hold_run_dir
    from kogia.train.supervised import build_run, main

    (folder / "pretrain.toml").write_text(f'out = "run"\ndevice = "cpu"\n{PRETRAIN}')
    config = replace(load_toml("pretrain.toml", SupervisedConfig), quiet=True, steps=2)
    main(config)
    state = "run/checkpoints/step-000002/train_state"
    files = [Path(state) / "state.json", Path(state) / "tensors.safetensors", Path("run/run.toml")]
    files += [path for path in Path("run/data").rglob("*") if path.is_file()]
    originals = {file: file.read_bytes() for file in files}
    more = replace(config, resume=True)

    def make(draw: random.Random) -> Case:
        file = draw.choice(files)
        data = originals[file]
        if file.suffix == ".json" and draw.random() < 0.8:
            file.write_bytes(as_file(mutated(json.loads(data), draw), draw))
        else:
            file.write_bytes(
                _changed_weights(data, draw) if file.suffix == ".safetensors" else mutated_bytes(data, draw)
            )

        def case() -> None:
            try:
                with hold_run_dir(more):
                    build_run(more).loader.next_batch()
            finally:
                file.write_bytes(data)
                Path("run/run.toml").write_bytes(originals[Path("run/run.toml")])

        return case

    return make


# The whole ------------------------------------------------------------------------------------------------------------


def shares(count: int, names: Sequence[str] = ()) -> dict[str, int]:
    """Cases of each target, `count` in all or a little more."""
    chosen = names or sorted(TARGETS)
    total = sum(TARGETS[name].share for name in chosen)
    return {name: -(-count * TARGETS[name].share // total) for name in chosen}


def load_everything() -> None:
    """Import what cases need, so that their children need not."""
    import importlib

    import torch

    from kogia.cli import COMMANDS

    torch.set_num_threads(1)
    for command in COMMANDS.values():
        importlib.import_module(command.main.partition(":")[0])
    for name in ("torch._dynamo", "tyro", "sympy", "math_verify", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)
    gc.freeze()  # else every child's collector would copy what it shares with this process


def main(count: int, seed: int, names: Sequence[str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    load_everything()
    with tempfile.TemporaryDirectory() as place:
        results = {}
        for name, cases in shares(count, names).items():
            began = time.monotonic()
            found = run(name, cases, seed, Path(place))
            print(*found.faults, sep="\n", end="\n" if found.faults else "", file=sys.stderr)
            seconds = round(time.monotonic() - began, 1)
            results[name] = {**found.counts, "slowest": round(found.slowest, 2), "seconds": seconds}
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
