"""A setting that is doomed to fail is refused before any work: alike with and without --dry-run, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from e2e.kogia_cli import kogia_here

from kogia.checkpoint.hf import save_model
from kogia.demo.config import RECIPES
from kogia.model.config import GQAConfig, ModelConfig
from kogia.model.transformer import build_model
from kogia.text.tokenizer import train_bpe

WORDS = " ".join(f"word{i} word{i}" for i in range(400))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pretrained, checkpoint) -> Path:
    """pretrain.toml and the run `base` (latent attention, a context of 192), `tiny`, and what is wrong in one place."""
    folder = tmp_path_factory.mktemp("doomed")
    shutil.copytree(pretrained / "base", folder / "base")
    shutil.copy(pretrained / "pretrain.toml", folder)
    shutil.copytree(checkpoint, folder / "tiny")
    (folder / "rows.jsonl").write_text('{"prompt": "1+1?", "completion": "2"}\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "other.jsonl").write_text('{"question": "1+1?", "reply": "2"}\n')
    train_bpe([WORDS], 600).save(folder / "words")
    shutil.copytree(folder / "tiny", folder / "unweighted")
    (folder / "unweighted" / "model.safetensors").unlink()
    tokenizer = train_bpe(["say 1 2 3"], 270)
    attention = GQAConfig(num_heads=2, num_kv_heads=1, head_dim=8)
    model = ModelConfig(tokenizer.vocab_size, 16, 1, 16, attention=attention, moe=None, max_position=128)
    save_model(build_model(model, seed=0), folder / "heads", tokenizer)
    return folder


PRETRAIN = ("pretrain", "pretrain.toml", "--out", "new")
SFT = ("sft", "--out", "new", "--epochs", "1", "--init", "base", "--data", "rows.jsonl", "--data.max-seqlen", "128")
DISTILL = ("distill", "pretrain.toml", "--out", "new", "--tokenizer", "base/tokenizer")
RL = ("rl", "--init", "base", "--out", "new")
EVAL = ("eval", "base", "--out", "new")
CURATE = ("curate", "base", "--out", "new/kept.jsonl")
FEW = ("--task-options.countdown.max-number", "3")
DOOMED = [
    # beyond the model
    (PRETRAIN, ("--data.max-seqlen", "256"), "data.max_seqlen = 256: above model.max_position = 192"),
    (SFT, ("--data.max-seqlen", "193"), "data.max_seqlen = 193: above model.max_position = 192"),
    (DISTILL, ("--model.max-position", "64"), "data.max_seqlen = 128: above model.max_position = 64"),
    (PRETRAIN, ("--model.vocab-size", "100"), "vocab_size=100"),
    (PRETRAIN, ("--tokenizer", "words"), "tokens, the model only 300"),
    (SFT, ("--tokenizer", "words"), "tokens, the model only 300"),
    (PRETRAIN, ("--nested-rank-min", "17"), "nested_rank_min = 17: the model has kv_lora_rank = 16"),
    (PRETRAIN, ("--index-topk", "4"), "index_topk and train_only = 'indexer' need a model with a lightning indexer"),
    (SFT, ("--train-only", "indexer"), "index_topk and train_only = 'indexer' need a model with a lightning indexer"),
    (SFT, ("--init", "heads", "--add-indexer.topk", "4"), "add_indexer: the model of init has no latent attention"),
    # not there, or no such thing
    (SFT, ("--init", "absent"), "absent: no such file or directory"),
    (SFT, ("--init", "unweighted"), "model.safetensors: missing"),
    (PRETRAIN, ("--tokenizer", "absent"), "absent"),
    (PRETRAIN, ("--data", "rows.jsonl", "absent.jsonl"), "data source 'absent.jsonl': no such file"),
    (SFT, ("--data", "other.jsonl"), "other.jsonl, line 1: keys ['question', 'reply'] is no document"),
    (SFT, ("--data", "empty.jsonl"), "empty.jsonl: no document in it"),
    (SFT, ("--data", "kogia.tasks.synthetic:absent"), "has no 'absent'"),
    (PRETRAIN, ("--device", "cuda:77"), "device = 'cuda:77': not usable here"),
    (RL, ("--device", "cuda:77"), "device = 'cuda:77': not usable here"),
    (EVAL, ("--dtype", "fp8"), "holds no FP8 weights to keep"),
    # places
    (PRETRAIN, ("--out", "base"), "already holds a run up to step-000012"),
    (SFT, ("--out", "rows.jsonl/new"), "rows.jsonl is a file, where a directory is needed"),
    (PRETRAIN, ("--data.cache-dir", "rows.jsonl"), "rows.jsonl is a file, where a directory is needed"),
    (RL, ("--out", "base", "--overwrite"), "overwrite: would delete init = 'base'"),
    (RL, ("--resume",), "there is no run to resume"),
    (EVAL, ("--out", "rows.jsonl"), "rows.jsonl is a file, where a directory is needed"),
    (EVAL, ("--resume",), "resume: nothing was begun in new"),
    (EVAL, ("--compare", "absent"), "absent"),
    (CURATE, ("--out", "rows.jsonl"), "exists and was not written by curate"),
    (CURATE, ("--out", "rows.jsonl/kept.jsonl"), "rows.jsonl is a file, where a directory is needed"),
    # the engine
    (RL, ("--init", "heads", "--engine.num-draft-tokens", "1"), "the model has no MTP module to draft with"),
    (EVAL, ("--engine.cache-memory-bytes", "10"), "engine.cache_memory_bytes = 10: one block of 16 tokens takes"),
    (CURATE, ("--engine.num-blocks", "1", "--engine.block-size", "2"), "but what the whole cache holds is 3"),
    (RL, ("--engine.num-blocks", "1", "--engine.block-size", "2"), "but what the whole cache holds is 3"),
    # tasks
    (RL, ("--tasks", "contdown"), "did you mean 'countdown'"),
    (CURATE, ("--tasks", "absent_tasks:Mine"), "absent_tasks"),
    (RL, ("--tasks", "toy_task:Empty", "--eval-questions", "0"), "has no problem in its 'train' split"),
    (EVAL, (*FEW, "--task-options.countdown.test-count", "999"), "test_count=999: only"),
    (RL, (*FEW, "--task-options.countdown.train-count", "999", "--eval-questions", "0"), "train_count=999: only"),
    (CURATE, ("--tasks", "toy_task:Wordy"), "but the model's context is 192"),
    # numbers
    (PRETRAIN, ("--threads", "0"), "threads = 0: must be at least 1"),
    (RL, ("--threads", "0"), "threads = 0: must be at least 1"),
    (PRETRAIN, ("--seed=-1",), "seed = -1: must lie in 0..4294967295"),
    (RL, ("--seed", "4294967296"), "seed = 4294967296: must lie in"),
    (RL, ("--verify-timeout", "0"), "verify_timeout = 0.0: must be above 0 seconds"),
    (CURATE, ("--verify-timeout", "1e9"), "verify_timeout = 1000000000.0: must be above 0 seconds"),
    (RL, ("--logprob-tolerance", "0"), "logprob_tolerance = 0.0: must be above 0"),
    (CURATE, ("--min-completion-tokens", "600"), "min_completion_tokens = 600: above max_tokens = 512"),
    (CURATE, ("--max-solve-rate", "0"), "nothing would be kept"),
    (CURATE, ("--script", "LATN"), "script = 'LATN'"),
]  # fmt: skip


def refused(folder: Path, *words: str) -> str:
    """What a command says that must end with status 2, on one line and without a frame."""
    _, err = kogia_here(folder, *words, status=2)
    return " ".join(err.replace("│", " ").split())


def listing(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "flags", "message"), DOOMED, ids=lambda part: part[0] if isinstance(part, tuple) and part else None
)
def test_what_must_fail_fails_first_and_in_a_dry_run_too(folder, words, flags, message):
    before = listing(folder)
    said = refused(folder, *words, *flags)
    assert message in said
    assert refused(folder, *words, *flags, "--dry-run") == said
    assert listing(folder) == before


@pytest.mark.parametrize("words", [PRETRAIN, SFT, DISTILL, RL, EVAL, CURATE], ids=lambda words: words[0])
def test_what_can_be_done_passes_its_dry_run_and_writes_nothing(folder, words):
    before = listing(folder)
    plan, _ = kogia_here(folder, *words, "--dry-run")
    assert "# parameters" in plan
    assert listing(folder) == before


@pytest.mark.parametrize(("flags", "longest"), [((), 192), (("--data.batch-tokens", "100"), 100)])
def test_a_length_that_is_not_given_is_one_that_model_and_batch_hold(folder, flags, longest):
    words = ("sft", "--out", "new", "--epochs", "1", "--init", "base", "--data", "rows.jsonl", "--dry-run")
    plan, _ = kogia_here(folder, *words, *flags)
    assert f"max_seqlen = {longest}\n" in plan


def test_an_evaluation_resumed_under_other_settings_fails_before_the_model_is_loaded(folder):
    (folder / "begun").mkdir()
    (folder / "begun" / "countdown.partial.jsonl").write_text("{}\n")
    (folder / "begun" / "countdown.partial.settings").write_text(json.dumps({"temperature": 0.1}))
    words = ("eval", "base", "--out", "begun", "--resume")
    said = refused(folder, *words)
    assert "was begun with" in said
    assert refused(folder, *words, "--dry-run") == said


# The demonstration ----------------------------------------------------------------------------------------------------

WRONG_RECIPES = [
    ("student", "max_seqlen = 256", "max_seqlen = 600", "data.max_seqlen = 600: above model.max_position = 512"),
    ("rejection_sft", "max_seqlen = 256", "max_seqlen = 600", "data.max_seqlen = 600: above model.max_position = 512"),
    ("student", 'schedule = "cosine"', 'shedule = "cosine"', "did you mean 'schedule'?"),
    ("pretrain", "num_mtp_layers = 1", "num_mtp_layers = 0", "the model has no MTP module to draft with"),
    ("grpo", 'tasks = ["countdown"]', 'tasks = ["countdwn"]\n#', "did you mean 'countdown'"),
    ("curate", "keep_per_problem = 2", "keep_per_problem = 0", "keep_per_problem = 0: must be at least 1"),
    ("cold_start", "cold_start_traces", "cold_traces", "has no 'cold_traces'; did you mean 'cold_start_traces'?"),
    ("student", "steps = 800", "", "exactly one of steps = None and epochs = None"),
]


@pytest.mark.parametrize(("name", "right", "wrong", "message"), WRONG_RECIPES)
def test_a_wrong_recipe_of_any_stage_ends_a_demonstration_before_its_first(tmp_path, name, right, wrong, message):
    recipes = shutil.copytree(RECIPES, tmp_path / "recipes")
    text = (recipes / f"{name}.toml").read_text(encoding="utf-8")
    assert right in text
    changed = text.replace(right, wrong)
    if name == "grpo":  # its options are those of a task that is no longer named
        changed = changed.replace("task_options = { countdown", "task_options = { countdwn")
    (recipes / f"{name}.toml").write_text(changed, encoding="utf-8")
    words = ("demo", "--recipes", "recipes", "--out", "new")
    said = refused(tmp_path, *words)
    assert message in said
    assert refused(tmp_path, *words, "--dry-run") == said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--recipes", "absent"), "absent"),
        (("--scale", "nan"), "scale = nan"),
        (("--threads", "0"), "threads = 0: must be at least 1"),
        (("--seed=-3",), "seed = -3: must lie in"),
        (("--out", "file"), "is a file; name a directory"),
        (("--out", "file/new"), "file is a file, where a directory is needed"),
        (("--out", "mine"), "holds other files and no stages.json"),
        (("--device", "cuda:77"), "device = 'cuda:77': not usable here"),
    ],
)
def test_a_setting_of_the_demonstration_that_must_fail_fails_in_its_dry_run(tmp_path, flags, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    before = listing(tmp_path)
    said = refused(tmp_path, "demo", *flags)
    assert message in said
    assert refused(tmp_path, "demo", *flags, "--dry-run") == said
    assert listing(tmp_path) == before
