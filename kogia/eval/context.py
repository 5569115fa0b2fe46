"""`kogia context PATH`: how far back in its context a model looks.

Three measurements. The first is the one that says most of a small model; the last is what people know.
    loss by context     nats of the same last tokens of a window, with more and more of the text before them
    loss by position    nats of all tokens of the longest windows, in buckets of positions
    pass keys           a number hidden at some depth of a text, asked for at its end (arXiv 2305.16300, section 4.2)
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from kogia import log
from kogia.checkpoint.open import Found, find_model
from kogia.data.config import SourceConfig
from kogia.data.rows import Document
from kogia.data.sources import read_source
from kogia.engine.engine import Engine
from kogia.engine.limits import check_engine, longest_sequence
from kogia.engine.loop import OnProgress
from kogia.engine.request import Completion, SamplingParams, report_errors
from kogia.engine.threads import generation_threads
from kogia.eval.config import ContextConfig
from kogia.eval.context_figure import draw
from kogia.eval.intervals import mean_interval, unbounded_interval
from kogia.eval.run import evals_directory
from kogia.files import check_directory, replacing_file, write_json
from kogia.model.costs import num_params
from kogia.terminal import LiveLine
from kogia.text.tokenizer import Tokenizer

SHORTEST = 128
"""Tokens of the shortest default length, and of the first bucket of positions."""
POOL = 8
"""Pieces of text from which one window is drawn."""
SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Plan:
    """A measurement that can begin."""

    found: Found
    lengths: tuple[int, ...]
    windows: list[list[int]]
    """Token ids of the pieces that losses are measured on, each one token short of the largest length."""
    haystack: list[int]
    """Token ids that keys are hidden in, repeated where they do not suffice."""


@dataclass(frozen=True, slots=True)
class HiddenKey:
    """One question for a pass key."""

    length: int
    """Tokens of prompt and answer."""
    depth: float
    key: str
    prompt: list[int]
    num_answer: int
    """Tokens that the answer may take."""

    def is_found_by(self, completion: Completion) -> bool:
        return completion.text.strip().startswith(self.key)


def main(config: ContextConfig) -> None:
    """Measure, write NAME.json and NAME.png, and show the tables."""
    plan = plan_measurement(config)
    out = evals_directory(config.path, config.out)
    result = measure(config, plan)
    write_json(out / f"{config.name}.json", result)
    with replacing_file(out / f"{config.name}.png") as draft:
        draw(result, draft)
    print_result(result)
    log.conclude(_headline(result), out / f"{config.name}.png", "kogia", "context", "OTHER", "--help")


def plan_measurement(config: ContextConfig) -> Plan:
    """Raises ValueError for whatever would end the measurement later; loads no weights and writes nothing."""
    check_directory(evals_directory(config.path, config.out))
    found = find_model(config.path, device=config.device, dtype=config.dtype, quantize=config.quantize)
    check_engine(found.config, config.engine, found.dtype)
    longest = longest_sequence(found.config, config.engine, found.dtype)
    lengths = config.lengths or default_lengths(longest.tokens)
    if lengths[-1] > longest.tokens:
        raise ValueError(
            f"lengths: {lengths[-1]} tokens, but {longest.bound} is {longest.tokens}; leave it out, or {longest.remedy}"
        )
    windows = _windows(config, found.tokenizer, lengths[-1])
    num_begin = len(_begin(found.tokenizer))
    haystack = [token for window in windows for token in window[num_begin:]] or found.tokenizer.encode(SENTENCES)
    plan = Plan(found, lengths, windows, haystack)
    list(hidden_keys(config, plan, lengths[:1]))  # the shortest must have room
    return plan


def default_lengths(longest: int) -> tuple[int, ...]:
    """Doubled from SHORTEST, and `longest` itself."""
    doubled = itertools.takewhile(lambda length: length < longest, (SHORTEST << i for i in range(40)))
    return (*doubled, longest)


def measure(config: ContextConfig, plan: Plan) -> Row:
    """All that NAME.json holds."""
    model, tokenizer, directory = plan.found.open()
    engine = Engine(model, tokenizer, config.engine)
    settings = {key: value for key, value in asdict(config).items() if key not in ("path", "out", "engine", "quiet")}
    result: Row = {"checkpoint": str(directory), "settings": settings, "lengths": list(plan.lengths)}
    with generation_threads(config.threads, num_params(model.config)):
        with LiveLine("losses", quiet=config.quiet or not plan.windows) as line:
            nats = _nats(engine, plan, config.tail, _shown(line))
        with LiveLine("pass keys", quiet=config.quiet) as line:
            keys = list(hidden_keys(config, plan, plan.lengths))
            completions = engine.generate([key.prompt for key in keys], _greedy(keys), _shown(line))
    found = [key.is_found_by(completion) for key, (completion,) in zip(keys, completions, strict=True)]
    result["loss_by_context"] = by_context(nats, config.tail)
    result["loss_by_position"] = by_position(nats[plan.lengths[-1]]) if nats else []
    result["pass_keys"] = by_cell(keys, found)
    return result


def _windows(config: ContextConfig, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Pieces of documents that leave room for one more token in `length`, drawn from the first POOL times as many.

    Each has the tokenizer's BOS, if any, in front wherever it begins: models lean on that token.
    """
    if not config.text:
        return []
    begin = _begin(tokenizer)
    own, pieces, longest = length - 1 - len(begin), [], 0
    if config.tail >= own:
        raise ValueError(f"tail = {config.tail}: must be below the tokens of a window, {own}")
    for document in _documents(config):
        ids = tokenizer.encode(document.text)
        longest = max(longest, len(ids))
        starts = range(0, len(ids) - own + 1, own)[: config.windows]  # of no book all
        pieces += [begin + ids[start : start + own] for start in starts]
        if len(pieces) >= POOL * config.windows:
            break
    if not pieces:
        raise ValueError(
            f"text = {list(config.text)}: the longest document has {longest} tokens, and the largest of the lengths is "
            f"{length}; give longer documents, or smaller --lengths"
        )
    return random.Random(config.seed).sample(pieces, min(config.windows, len(pieces)))


def _documents(config: ContextConfig) -> Iterator[Document]:
    for spec in config.text:
        yield from read_source(SourceConfig(spec, text_key=config.text_key))


def _shown(line: LiveLine) -> OnProgress:
    return lambda done, total, _tokens: line.update(done, total)


def _nats(engine: Engine, plan: Plan, tail: int, on_progress: OnProgress) -> dict[int, list[list[float]]]:
    """By length: of each window's last tokens, so many, the negative log-probability of each but the first.

    A length that does not hold the tail and a token before it says nothing of the tail, and is left out.
    """
    if not plan.windows:
        return {}
    begin = _begin(plan.found.tokenizer)
    lengths = [length for length in plan.lengths if length - 1 - len(begin) > tail]
    prompts = [begin + window[len(begin) + 1 - length :] for length in lengths for window in plan.windows]
    params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=True)
    completions = engine.generate(prompts, params, on_progress)
    report_errors([completion for each in completions for completion in each])
    nats = iter([-value for value in _scores(each[0]) if value is not None] for each in completions)
    return {length: [next(nats) for _ in plan.windows] for length in lengths}


def _begin(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def _scores(completion: Completion) -> Sequence[float | None]:
    assert completion.prompt_logprobs is not None, "asked for"
    return completion.prompt_logprobs


def by_context(nats: dict[int, list[list[float]]], tail: int) -> list[Row]:
    """Nats of the windows' last `tail` tokens at each length, and what was gained over the shortest; windows are the
    unit."""
    rows: list[Row] = []
    means = {length: [fmean(window[-tail:]) for window in windows] for length, windows in nats.items()}
    for length, values in means.items():
        gains = [first - value for first, value in zip(next(iter(means.values())), values, strict=True)]
        gain = unbounded_interval(gains) if rows else None
        rows.append({"length": length, "nats": unbounded_interval(values).to_list()})
        rows[-1]["gain"] = None if gain is None else gain.to_list()
    return rows


def by_position(windows: Sequence[Sequence[float]]) -> list[Row]:
    """Nats of the tokens whose number of predecessors lies in [from, to), in buckets that double."""
    rows, start, end = [], 1, SHORTEST
    while start <= len(windows[0]):  # the token at place i is predicted from i others; place 0 by nobody
        parts = [window[start - 1 : end - 1] for window in windows]
        last = min(end, len(windows[0]) + 1)
        rows.append({"from": start, "to": last, "nats": unbounded_interval([*map(fmean, parts)]).to_list()})
        start, end = end, 2 * end
    return rows


def hidden_keys(config: ContextConfig, plan: Plan, lengths: Sequence[int]) -> Iterator[HiddenKey]:
    """The questions: each key is drawn by the seed, its length, its depth and its number alone."""
    tokenizer = plan.found.tokenizer
    for length, depth, number in itertools.product(lengths, config.depths, range(config.keys)):
        draw = random.Random(f"{config.seed}/{length}/{depth}/{number}")
        key = str(draw.randrange(10_000, 100_000))
        yield _hide(key, length, depth, plan.haystack, draw, tokenizer)


def _hide(
    key: str, length: int, depth: float, haystack: list[int], draw: random.Random, tokenizer: Tokenizer
) -> HiddenKey:
    needle, question = tokenizer.encode(KEY.format(key=key)), tokenizer.encode(QUESTION)
    begin = _begin(tokenizer)
    num_answer = len(tokenizer.encode(f" {key}.")) + 1
    room = length - num_answer - len(begin) - len(needle) - len(question)
    if room < 0:
        raise ValueError(
            f"lengths: {length} tokens do not hold a pass key and its question; give at least {length - room}"
        )
    start = draw.randrange(len(haystack))
    hay = list(itertools.islice(itertools.cycle(haystack), start, start + room))
    before = round(depth * room)
    return HiddenKey(length, depth, key, begin + hay[:before] + needle + hay[before:] + question, num_answer)


def _greedy(keys: Sequence[HiddenKey]) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=key.num_answer, temperature=0.0) for key in keys]


def by_cell(keys: Sequence[HiddenKey], found: Sequence[bool]) -> list[Row]:
    """The share of keys found, with its interval, at each length and depth."""
    cells: dict[tuple[int, float], list[float]] = {}
    for key, is_found in zip(keys, found, strict=True):
        cells.setdefault((key.length, key.depth), []).append(float(is_found))
    return [
        {"length": length, "depth": depth, "found": mean_interval(each).to_list()}
        for (length, depth), each in cells.items()
    ]


def print_result(result: Row) -> None:
    """The three tables on stdout."""
    console = Console()
    if result["loss_by_context"]:
        console.print(_loss_table(f"the same {result['settings']['tail']} tokens", result["loss_by_context"]))
        console.print(_position_table(result["loss_by_position"]))
    console.print(_key_table(result["pass_keys"]))


def _loss_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"Loss of {title}")
    for name in ("context", "nats", "95% interval", "gained", "95% interval"):
        table.add_column(name, justify="right")
    for row in rows:
        gain = ("", "") if row["gain"] is None else _words(row["gain"])
        table.add_row(f"{row['length']:,}", *_words(row["nats"]), *gain)
    return table


def _position_table(rows: Sequence[Row]) -> Table:
    table = Table(title="Loss by position")
    for name in ("tokens before", "nats", "95% interval"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row['from']:,} to {row['to'] - 1:,}", *_words(row["nats"]))
    return table


def _key_table(cells: Sequence[Row]) -> Table:
    """Depths downwards, lengths to the right."""
    table = Table(title="Pass keys found")
    table.add_column("depth", justify="right")
    lengths, depths = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("length", "depth"))
    share = {(cell["length"], cell["depth"]): cell["found"][0] for cell in cells}
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for depth in depths:
        table.add_row(f"{depth:.0%}", *(f"{share[length, depth]:.0%}" for length in lengths))
    return table


def _words(estimate: Sequence[float]) -> tuple[str, str]:
    mean, low, high = estimate
    return f"{mean:.3f}", f"{low:.3f} to {high:.3f}"


def _headline(result: Row) -> str:
    keys = fmean(cell["found"][0] for cell in result["pass_keys"])
    words = f"{keys:.0%} of the pass keys found up to {result['lengths'][-1]:,} tokens"
    if len(result["loss_by_context"]) > 1:
        first, last = result["loss_by_context"][0], result["loss_by_context"][-1]
        words += f", {last['gain'][0]:.3f} nats gained from {first['length']:,} to {last['length']:,}"
    return words
