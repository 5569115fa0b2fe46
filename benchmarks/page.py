"""The web chat: how soon a browser may be typed into, and what HTML costs an answer that streams.

    python benchmarks/page.py [--rounds 7] [--out benchmarks/results/page.json]

`kogia serve` in a process of its own, with the demonstration's model and random weights, on a CPU. Needs Chromium and
playwright. A round opens the page in a context with an empty cache, from navigation until its model is named and what
is typed can be sent; one that is thrown away warms the browser up. Then the page's own stream and the API's take turns
with the same seeds; the text is what a random model writes, so paragraphs and marks are short.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, expect, sync_playwright
from result import row, write_result

from kogia.checkpoint.hf import save_model
from kogia.model.presets import preset
from kogia.model.transformer import build_model
from kogia.text.tokenizer import train_bpe

LIMIT = 1.0
"""Seconds until the page is interactive."""
TOKENS = 1500
FLAGS = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/page.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, served(make_model(Path(directory))) as url:
        rows = [*interactive(url, args.rounds), streaming(url, args.rounds)]
    write_result(args.out, "page", rows)
    print(json.dumps(rows, indent=1))


def make_model(directory: Path) -> Path:
    tokenizer = train_bpe(["the answer is 42. " * 20, "numbers 4 6 15 target 17"], 300)
    config = replace(preset("kogia-demo"), vocab_size=300, max_position=4096)
    return save_model(build_model(config, seed=0), directory / "demo", tokenizer)


@contextmanager
def served(model: Path) -> Iterator[str]:
    """The address of a server that is ready."""
    words = ["serve", str(model), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.match(r"(http://\S+) serves", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line}{process.stderr.read()}")
        yield found[1]
    finally:
        process.kill()
        process.wait()


def interactive(url: str, rounds: int) -> list[dict[str, Any]]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[f"--{flag}" for flag in FLAGS])
        seconds = [opened(browser, url) for _ in range(rounds + 1)][1:]
        versions = {"chromium": browser.version, "playwright": version("playwright")}
        browser.close()
    id = "page-interactive-seconds"
    return [row(id, median(seconds), "s", low=min(seconds), high=max(seconds), limit=LIMIT, rounds=rounds, **versions)]


def opened(browser: Browser, url: str) -> float:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    expect(page.locator(".greeting h2")).to_have_text("demo")
    page.keyboard.type("x")  # the field has the focus
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    taken = time.perf_counter() - began
    context.close()
    return taken


def streaming(url: str, rounds: int) -> dict[str, Any]:
    """Percent of tokens per second that an answer loses where its HTML comes with it."""
    paths = ("/v1/chat/completions", "/page/chat")
    taken = [[seconds_of(url + path, seed) for path in paths] for seed in range(rounds + 1)][1:]
    lost = [100 * (1 - plain / shown) for plain, shown in taken]
    rates = [round(TOKENS / median(pair[at] for pair in taken), 1) for at in (0, 1)]
    id = "page-stream-lost-percent"
    more = {"tokens": TOKENS, "rounds": rounds, "api_tokens_per_second": rates[0], "page_tokens_per_second": rates[1]}
    return row(id, median(lost), "%", low=min(lost), high=max(lost), **more)


def seconds_of(url: str, seed: int) -> float:
    """Of a whole answer, as it streams."""
    message = {"role": "user", "content": "numbers 4 6 15 target 17"}
    body = {"messages": [message], "seed": seed, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    began = time.perf_counter()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"content-type": "application/json"}), timeout=120
    ) as response:
        for _ in response:
            pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
