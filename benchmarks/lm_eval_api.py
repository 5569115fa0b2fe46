"""Does lm-eval, asking a served model, get the answers that `kogia eval` gets? GSM8K's first 50 questions, greedy.

    python benchmarks/lm_eval_api.py --model RUN --gsm8k FOLDER [--lm-eval PYTHON] [--items 50] [--out FILE]

`kogia eval` and `kogia serve` load the same model; lm-eval is an interpreter's that has it, as it is (pip install
'lm-eval[api]' transformers): `local-completions` with the model's tokenizer and chat template, read by transformers,
and several requests at a time. The questions are a task of its own that reads a file, since nothing is downloaded. Both
take the steps of deterministic mode, which `kogia eval` has on a CPU by itself: an answer does not depend on what else
runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from result import row, write_result

from kogia.checkpoint.directory import resolve_model_dir
from kogia.tasks.gsm8k import Gsm8k

TASK = """\
task: questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {tokens}, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as `kogia eval` takes it")
    parser.add_argument("--gsm8k", required=True, help="folder of GSM8K's files")
    parser.add_argument("--lm-eval", default=sys.executable, help="interpreter that has lm-eval")
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lm_eval_api.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = questions_in(Path(folder), args.gsm8k, args.items)
        own = by_kogia(args.model, file, args.items, args.tokens)
        with served(args.model) as url:
            theirs = by_lm_eval(args.lm_eval, url, resolve_model_dir(args.model), file, args.tokens)
    assert own.keys() == theirs.keys() and len(own) == args.items, "each has answered every question"
    equal = sum(own[question] == theirs[question] for question in own)
    write_result(
        args.out,
        "lm_eval_api",
        [row("lm-eval-equal-answers", equal, "answers", limit=args.items, items=args.items, max_tokens=args.tokens,
             distinct=len(set(own.values())), lm_eval=version_of(args.lm_eval))],
    )  # fmt: skip
    print(args.out.read_text())


def questions_in(folder: Path, gsm8k: str, items: int) -> Path:
    """A file of the first questions of the test split, as the set's own are written."""
    problems = Gsm8k(path=gsm8k, instruction="").problems("test")[:items]
    rows = [{"question": each.messages[0].content, "answer": each.data["answer"]} for each in problems]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def by_kogia(model: str, file: Path, items: int, tokens: int) -> dict[str, str]:
    """Question -> answer."""
    options = {"path": file, "instruction": ""}
    words = [word for key, value in options.items() for word in (f"--task-options.gsm8k.{key}", str(value))]
    words += ["--num-questions", str(items), "--num-samples", "0", "--greedy", "--max-tokens", str(tokens)]
    kogia("eval", model, "--tasks", "gsm8k", *words, "--device", "cpu", "--out", str(file.parent), "--quiet")
    rows = [json.loads(line) for line in (file.parent / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]
    return {each["prompt"]: each["text"] for each in rows}


def by_lm_eval(python: str, url: str, model: Path, file: Path, tokens: int) -> dict[str, str]:
    """Question -> answer."""
    (file.parent / "questions.yaml").write_text(TASK.format(file=file, tokens=tokens))
    about = f"base_url={url}/v1/completions,model=served,num_concurrent=8,max_retries=1,"
    about += f"tokenizer_backend=huggingface,tokenizer={model}"  # the server's own takes no conversations
    words = ["--model", "local-completions", "--model_args", about, "--apply_chat_template", "--log_samples"]
    words += ["--tasks", "questions", "--include_path", str(file.parent), "--output_path", str(file.parent / "theirs")]
    subprocess.run([python, "-m", "lm_eval", *words], check=True, env=offline(file.parent))
    (found,) = (file.parent / "theirs").rglob("samples_questions_*.jsonl")
    rows = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    return {each["doc"]["question"]: each["resps"][0][0] for each in rows}


def offline(folder: Path) -> dict[str, str]:
    return {**os.environ, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}


@contextmanager
def served(model: str) -> Iterator[str]:
    words = ["serve", model, "--name", "served", "--port", "0", "--device", "cpu", "--engine.deterministic", "True"]
    server = subprocess.Popen([sys.executable, "-m", "kogia.cli", *words], stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        yield server.stderr.readline().split()[0]
    finally:
        server.kill()
        server.wait()


def kogia(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "kogia.cli", *words], check=True, stdout=subprocess.DEVNULL)


def version_of(python: str) -> Any:
    code = "from importlib.metadata import version; print(version('lm-eval'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
