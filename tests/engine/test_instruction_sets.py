"""Whatever the processor can do, the engine runs on it: with the kernels of each instruction set, and without any."""

import json
import os
import subprocess
import sys

import pytest

from kogia.ops.cpu import build

# greedy tokens of a random model whose logits lie apart, in bfloat16 and with packed weights; then the backend that a
# product takes, and whether decode steps are recorded
RUN = """
import json, sys
import torch
from kogia.ops.cpu import build
if sys.argv[1:]:
    build._processor_flags = lambda: set(sys.argv[1:])
from kogia.engine.config import EngineConfig
from kogia.engine.engine import Engine
from kogia.engine.request import SamplingParams
from kogia.model.config import MLAConfig, ModelConfig, MoEConfig
from kogia.model.quantised import build_packed
from kogia.model.transformer import build_model
from kogia.ops.dispatch import OPS
config = ModelConfig(
    vocab_size=61, dim=64, num_layers=2, ffn_dim=128, max_position=64, init_std=0.2,
    attention=MLAConfig(num_heads=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32),
    moe=MoEConfig(num_experts=4, num_shared_experts=1, topk=2, expert_dim=64, num_dense_layers=1),
)
dense = build_model(config, seed=3, dtype=torch.bfloat16)
with torch.no_grad():
    dense.lm_head.weight.mul_(4)
models = [dense] + [build_packed(config, kind, device="cpu", dtype=torch.bfloat16, seed=3) for kind in ("int8", "int4")]
params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=True, ignore_eos=True)
found = []
for model in models:
    engine = Engine(model, None, EngineConfig(block_size=4, num_blocks=40))
    (completion,), _ = engine.generate([[5, 9, 11, 3], [7]], params)
    found.append([completion.token_ids, completion.logprobs, engine.runner.graphs is not None])
x = torch.ones(1, 64, dtype=torch.bfloat16)
with torch.no_grad():
    backend = OPS["linear"]._pick((x, dense.lm_head.weight), {})
print(json.dumps([found, getattr(backend, "name", "reference")]), "torch._dynamo" in sys.modules)
"""


def run(*flags: str, **variables: str) -> tuple[list, str, str]:
    """(tokens, log-probabilities and whether steps are recorded, of each model), the backend of a product, stderr."""
    inherited = {name: value for name, value in os.environ.items() if name != build.CHOICE}
    command = [sys.executable, "-c", RUN, *flags]
    done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True, check=True)
    line, _, loads_compiler = done.stdout.strip().rpartition(" ")
    found, backend = json.loads(line)
    assert loads_compiler == "False"  # it takes a second, in which an answer that has begun would stand still
    return found, backend, done.stderr


@pytest.fixture(scope="module")
def without() -> list:
    """As PyTorch computes it."""
    found, backend, said = run(**{build.CHOICE: build.NONE})
    assert backend != "cpu"
    assert said == ""
    return found


def assert_equal(found: list, expected: list, *, recorded: bool) -> None:
    for (ids, logprobs, graphs), (their_ids, theirs, _) in zip(found, expected, strict=True):
        assert graphs == recorded
        assert ids == their_ids
        assert max(abs(a - b) for a, b in zip(logprobs, theirs, strict=True)) < 0.1


@pytest.mark.parametrize("name", build.LEVELS)
def test_each_instruction_set_of_this_processor_gives_the_tokens_of_none(name, without):
    try:
        if list(build.LEVELS).index(name) < list(build.LEVELS).index(build.level()):
            pytest.skip(f"this processor has no {name}")
        build.load(name)
    except ImportError as error:
        pytest.skip(f"no kernels here: {error}")
    found, backend, said = run(**{build.CHOICE: name})
    assert (backend, said) == ("cpu", "")
    assert_equal(found, without, recorded=True)


def test_a_processor_without_the_instructions_falls_back_with_one_line(without):
    found, backend, said = run("sse2", "avx", ATEN_CPU_CAPABILITY="default")
    assert backend != "cpu"
    assert said == (
        "warning: no kernels for this CPU: this processor has no AVX2, for which there are kernels; PyTorch's own "
        "operations serve, which is slower\n"
    )
    assert_equal(found, without, recorded=False)


def test_no_compiler_is_said_once(tmp_path):
    _, backend, said = run(XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path), CXX="")
    assert backend != "cpu"
    assert said.count("\n") == 1
    assert "warning: no kernels for this CPU: there is no C++ compiler: install one of g++" in said


@pytest.mark.parametrize("name", ["avx2", "AVX-1024"])
def test_a_name_of_no_instruction_set_of_this_processor_is_refused_with_those_there_are(name, monkeypatch):
    monkeypatch.setenv(build.CHOICE, name)
    with pytest.raises(ValueError, match=rf"KOGIA_CPU_KERNELS = {name}: must be one of .*none on this processor"):
        build.level.__wrapped__()
    monkeypatch.setattr(build, "_processor_flags", lambda: {"avx2", "fma"})
    monkeypatch.setenv(build.CHOICE, "AVX-512")  # there, but not here: it would end the process
    with pytest.raises(ValueError, match="KOGIA_CPU_KERNELS = AVX-512: must be one of AVX2, none on this processor"):
        build.level.__wrapped__()
    monkeypatch.setenv(build.CHOICE, "")
    assert build.level.__wrapped__() == "AVX2"
