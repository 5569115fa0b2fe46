"""`kogia` as a user runs it, on settings that take a second or two: in its own process, or faster in this one."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

from kogia.cli import main

TESTS = Path(__file__).parent.parent
SEARCHED = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))

PRETRAIN = """
out = "base"
steps = 12
threads = 1
[model]
vocab_size = 300
dim = 32
num_layers = 2
ffn_dim = 48
num_mtp_layers = 1
max_position = 192
[model.attention]
kind = "mla"
num_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 16
[model.moe]
num_experts = 4
topk = 2
expert_dim = 16
[data]
batch_tokens = 512
max_seqlen = 128
val_share = 0.05
[[data.sources]]
spec = "kogia.tasks.synthetic:base_corpus"
num = 400
[optim]
lr = 3e-3
warmup_steps = 2
"""


def start(folder: Path, *words: str, code: str = "") -> subprocess.Popen:
    """`kogia WORDS` with `folder` as current directory; `code` runs before it in the same process."""
    program = [sys.executable, "-c", f"{code}\nimport sys\nfrom kogia.cli import main\nsys.exit(main())"]
    environment = os.environ | {"PYTHONPATH": SEARCHED, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [*program, *words],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kogia(
    folder: Path, *words: str, status: int = 0, stdin: str = "", code: str = "", timeout: float = 100.0
) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with `status`, and without a traceback."""
    process = start(folder, *words, code=code)
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == status, f"{words}: status {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def kogia_here(folder: Path, *words: str, status: int = 0) -> tuple[str, str]:
    """The same without a new process and its imports."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found = main(words)
        except SystemExit as error:
            found = error.code
    assert found == status, f"{words}: status {found}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def fails(folder: Path, *words: str, code: str = "") -> str:
    """The one error line of a command that must end with status 2; with `code`, in a process of its own."""
    _, err = kogia(folder, *words, status=2, code=code) if code else kogia_here(folder, *words, status=2)
    (line,) = [line for line in err.splitlines() if line.startswith("kogia: error: ")]
    assert err.rstrip().endswith(line), f"something follows the error:\n{err}"
    return line.removeprefix("kogia: error: ")
