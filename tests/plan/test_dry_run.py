import subprocess
import sys
import tomllib

import pytest

from kogia.config import from_dict
from kogia.eval.config import EvalConfig
from kogia.model.config import ModelConfig
from kogia.model.costs import num_active_params, num_mtp_params, num_params, train_memory
from kogia.model.presets import preset
from kogia.plan.dry_run import print_dry_run, sampling_memory, training_memory
from kogia.rl.config import CurateConfig, RLConfig
from kogia.train.config import SupervisedConfig

RECIPES = [
    SupervisedConfig(out="runs/a b", model=preset("kogia-demo"), steps=3),
    RLConfig(init="x", out="y", tasks=("countdown",), task_options={"countdown": {"max_target": 9}}),
    EvalConfig("m", tasks=("my.tasks:Sudoku",), task_options={"my.tasks:Sudoku": {"hard": True}}),
    CurateConfig("m", out="c.jsonl", min_reward=0.5),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_plan_of_every_command_reads_back_as_its_recipe(recipe, capsys: pytest.CaptureFixture[str]):
    print_dry_run(recipe, preset("kogia-demo"), [("length", "3 steps = 30 tokens")])
    assert from_dict(type(recipe), tomllib.loads(capsys.readouterr().out)) == recipe


def test_the_comments_hold_the_counts_of_the_model(capsys: pytest.CaptureFixture[str]):
    model = preset("kogia-demo")
    print_dry_run(RECIPES[2], model, [("length", "first"), ("", "second")])
    comments = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert comments[0] == f"# parameters  {num_params(model):,} ({num_active_params(model):,} active per token)"
    assert comments[1] == f"#             {num_mtp_params(model):,} more in 1 multi-token prediction module(s)"
    parts = [line.split(maxsplit=2) for line in comments[2:-2]]
    assert sum(int(number.replace(",", "")) for _, number, _ in parts) == num_params(model) + num_mtp_params(model)
    assert [name for _, _, name in parts] == [
        "embedding and head",
        "attention",
        "routed experts",
        "dense layers, shared experts, router",
        "norms",
        "multi-token prediction",
    ]
    assert comments[-2:] == ["# length      first", "#             second"]


def test_a_model_without_experts_and_modules_has_no_lines_about_them(capsys: pytest.CaptureFixture[str]):
    print_dry_run(RECIPES[2], ModelConfig(moe=None), [])
    text = capsys.readouterr().out
    assert "feed-forward" in text
    assert "routed" not in text and "multi-token" not in text


def test_memory_is_that_of_the_costs():
    model = preset("kogia-10m")
    memory = train_memory(model, 4096)
    label, text = training_memory(model, 4096)
    assert label == "memory" and text.startswith(
        f"about {memory.total / 2**20:,.0f} MiB beside the libraries: weights "
    )
    assert f"activations {memory.activations / 2**20:,.0f} MiB" in text
    weights = 4 * num_params(model) / 2**20
    assert sampling_memory(model, 2**30)[1] == f"weights {weights:,.0f} MiB in float32, and at most 1,024 MiB of cache"
    assert sampling_memory(model, None)[1].endswith("in float32, and a share of the free memory of cache")


def test_a_plan_takes_no_torch():
    code = "import sys, kogia.plan.dry_run; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
