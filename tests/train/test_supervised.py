import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.runs import MODEL, assert_same_run, checkpoint_contents, tiny_run

from kogia.checkpoint.convert import convert
from kogia.checkpoint.hf import load_model
from kogia.checkpoint.resume import latest_checkpoint
from kogia.config import from_dict, load_toml, save_toml, to_dict
from kogia.data.config import DataConfig, SourceConfig
from kogia.log import read_metrics
from kogia.model.costs import num_active_params, num_params
from kogia.train import supervised
from kogia.train.config import OptimConfig, SupervisedConfig
from kogia.train.supervised import build_run, main

PROGRAM = """
import sys
from kogia.config import load_toml
from kogia.train.config import SupervisedConfig
from kogia.train.supervised import main
main(load_toml(sys.argv[1], SupervisedConfig))
"""


@pytest.fixture
def config(tmp_path) -> SupervisedConfig:
    return tiny_run(tmp_path)


def start(config: SupervisedConfig, directory: Path) -> subprocess.Popen:
    recipe = directory / "recipe.toml"
    save_toml(config, recipe)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(recipe)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_killed_in_the_middle_and_resumed_equals_one_that_never_stopped_to_the_bit(config, tmp_path):
    main(replace(config, out=str(tmp_path / "whole")))
    process = start(config, tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    wait_for(checkpoint.exists, process)
    time.sleep(0.03)  # a few steps further, so that there is something to redo
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    main(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "val_loss" in line] == [20, 40]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_its_last_step_exits_130_and_resumes_exactly(config, tmp_path, number):
    endless = replace(config, steps=4000, save_every=0, optim=replace(config.optim, schedule="constant"))
    process = start(endless, tmp_path)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 3, process)
    os.kill(process.pid, number)
    _, messages = process.communicate(timeout=60)
    # an uncaught KeyboardInterrupt ends Python by SIGINT, which a shell reports as 130
    assert process.returncode in (-signal.SIGINT, 130)
    assert "--resume continues" in messages
    done = read_metrics(tmp_path / "run")[-1]["step"]
    assert latest_checkpoint(tmp_path / "run").name == f"step-{done:06d}"
    if number == signal.SIGTERM:
        return
    for out, steps, resume in (("whole", done + 4, False), ("run", done + 4, True)):
        main(replace(endless, out=str(tmp_path / out), steps=steps, eval_every=0, resume=resume, mtp_late_at=1.0))
    a, b = (checkpoint_contents(latest_checkpoint(tmp_path / run)) for run in ("whole", "run"))
    assert all(torch.equal(v, b[k]) for k, v in a.items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("killed_at", [10, 20])
def test_a_validation_that_a_kill_prevented_is_done_on_resume(config, tmp_path, killed_at):
    config = replace(config, steps=20, eval_every=10)
    main(replace(config, out=str(tmp_path / "whole")))
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    lines = read_metrics(run)
    measured = [line["step"] for line in lines if "val_loss" in line]
    assert measured == [10, 20]
    before = [line for line in lines if line["step"] <= killed_at and ("loss" in line or line["step"] < killed_at)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    if killed_at == 10:
        shutil.rmtree(run / "checkpoints" / "step-000020")
    for _ in range(2):  # the second one finds it done
        main(replace(config, resume=True))
        assert_same_run(tmp_path / "whole", run)


def test_a_signal_in_the_last_step_leaves_its_validation_to_the_resumed_run(config, monkeypatch):
    config = replace(config, steps=2, eval_every=0)
    training_step = supervised.train_step

    def step_and_signal(*args):
        metrics = training_step(*args)
        if args[0].step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    monkeypatch.setattr(supervised, "train_step", step_and_signal)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    assert latest_checkpoint(config.out).name == "step-000002"
    assert not any("val_loss" in line for line in read_metrics(config.out))
    main(replace(config, resume=True))
    assert [line["step"] for line in read_metrics(config.out) if "val_loss" in line] == [2]


def test_a_signal_while_validating_is_heeded_after_the_next_step_which_is_saved(config, monkeypatch):
    config = replace(config, steps=9, save_every=0, eval_every=2)
    validate = supervised.validation_loss

    def validate_and_signal(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    monkeypatch.setattr(supervised, "validation_loss", validate_and_signal)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    assert latest_checkpoint(config.out).name == "step-000003"
    assert read_metrics(config.out)[-1]["step"] == 3


def test_training_learns_and_leaves_a_complete_run_directory(config, tmp_path):
    main(config)
    run = tmp_path / "run"
    names = {"run.toml", "metrics.jsonl", "routing.jsonl", "checkpoints", "data", "tokenizer"}
    assert {p.name for p in run.iterdir()} == names
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000030", "step-000040"]
    lines = read_metrics(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]
    assert lines[-1]["val_loss"] == pytest.approx(steps[-1]["loss"], rel=0.15)
    expected = {"loss", "mtp_loss_1", "entropy", "balance", "grad_norm", "lr", "tokens", "max_vio", "tokens_per_second"}
    assert expected <= steps[0].keys()
    assert load_toml(run / "run.toml", SupervisedConfig) == config
    assert load_model(run).config == MODEL


def test_fine_tuning_of_16_bit_weights_is_in_float32(config, tmp_path):
    main(replace(config, steps=1))
    convert(config.out, tmp_path / "half", dtype="bfloat16")
    tuned = replace(config, out=str(tmp_path / "tuned"), model=None, init=str(tmp_path / "half"), steps=1)
    model = build_run(tuned).state.model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, load_model(tmp_path / "half").lm_head.weight.float())


def test_fine_tuning_starts_from_the_weights_and_tokenizer_of_another_run(config, tmp_path):
    main(replace(config, steps=10))
    tuned = replace(config, out=str(tmp_path / "tuned"), model=None, init=config.out, steps=None, epochs=0.5)
    run = build_run(tuned)
    base = load_model(config.out).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in run.state.model.state_dict().items())
    tokens = run.loader.tokens_per_epoch / 2
    assert run.state.num_steps == -(-tokens // 256)
    main(replace(tuned, overwrite=True))
    assert latest_checkpoint(tuned.out).name == f"step-{run.state.num_steps:06d}"


def test_a_run_directory_in_use_is_refused_overwritten_or_resumed_as_asked(config, tmp_path):
    short = replace(config, steps=2, save_every=1)
    main(short)
    with pytest.raises(ValueError, match=r"already holds a run up to step-000002; add --resume .*--overwrite"):
        main(short)
    main(replace(short, resume=True))  # complete: nothing to do
    assert len(read_metrics(short.out)) == 3
    main(replace(short, overwrite=True, steps=1))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(ValueError, match=r"mine.*holds other files"):
        main(replace(short, out=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_run_in_the_same_directory_is_refused_and_the_first_goes_on(config, tmp_path, flags):
    process = start(replace(config, steps=4000, save_every=1), tmp_path)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 2, process)
    with pytest.raises(ValueError, match=r"run': another run is writing there; wait until it ends"):
        main(replace(config, **flags))
    seen = len(read_metrics(tmp_path / "run"))
    wait_for(lambda: len(read_metrics(tmp_path / "run")) > seen, process)
    os.kill(process.pid, signal.SIGKILL)  # no lock survives this
    process.communicate()
    done = latest_checkpoint(tmp_path / "run").name
    main(replace(config, steps=int(done[-6:]) + 1, resume=True))
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def noted_rows(notes: str) -> Iterator[str]:
    """Notes the id of the process that reads it, and gives its rows slowly where the folder has a file `slow`."""
    with (Path(notes) / "ids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    for i in range(200):
        time.sleep(0.05 if (Path(notes) / "slow").exists() else 0.0)
        yield f"the number {i} follows {i - 1}"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a process of id 1 takes a namespace of its own")
def test_a_run_killed_while_it_tokenised_as_process_1_of_a_container_starts_again_as_process_1(config, tmp_path):
    namespace = ["unshare", "--pid", "--fork", "--kill-child", *(["--user", "--map-root-user"] * (os.getuid() != 0))]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here; tests/test_files.py has processes of one id without them")
    cache, notes = tmp_path / "cache", tmp_path / "notes"
    notes.mkdir()
    source = SourceConfig(f"{__name__}:noted_rows", options={"notes": str(notes)})
    data = replace(config.data, sources=(source,), cache_dir=str(cache))
    save_toml(replace(config, steps=2, data=data), tmp_path / "recipe.toml")

    def start_as_1() -> subprocess.Popen:
        command = [*namespace, sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.toml")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    seen = set()
    for _ in range(2):
        (notes / "slow").touch()
        process = start_as_1()
        wait_for(lambda seen=seen: cache.is_dir() and {p.name for p in cache.glob(".*.tmp")} - seen, process)
        process.kill()
        process.communicate()
        left = {path.name for path in cache.iterdir()}
        assert len(left) == 1, "each start cleans up after the one before"
        seen |= left
    (notes / "slow").unlink()
    messages = start_as_1().communicate(timeout=100)[1]
    assert "Error" not in messages
    assert latest_checkpoint(tmp_path / "run").name == "step-000002"
    assert set((notes / "ids").read_text().split()) == {"1"}
    assert len(seen) == 2 and not seen & {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_directory_deleted_or_moved_while_it_trains_ends_the_run_with_an_error(config, tmp_path, moved):
    process = start(replace(config, steps=4000, save_every=0), tmp_path)
    wait_for(lambda: len(read_metrics(tmp_path / "run")) >= 2, process)
    (tmp_path / "run").rename(tmp_path / "moved")
    if not moved:
        shutil.rmtree(tmp_path / "moved")
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "run/metrics.jsonl is gone" in messages
    assert not (tmp_path / "run").exists()


def test_a_run_directory_deleted_while_its_data_are_made_ends_the_run_with_an_error(config, monkeypatch):
    make_shards = supervised.build_shards

    def delete_and_make(*args):
        shutil.rmtree(config.out)
        return make_shards(*args)

    monkeypatch.setattr(supervised, "build_shards", delete_and_make)
    with pytest.raises(FileNotFoundError, match=r"run.toml is gone"):
        main(config)


def test_overwriting_deletes_all_but_the_directory_itself(config, tmp_path):
    short = replace(config, steps=1)
    main(short)
    run = tmp_path / "run"
    (run / "notes.txt").write_text("mine")
    (run / "link").symlink_to(tmp_path)
    inode = run.stat().st_ino
    main(replace(short, overwrite=True))
    assert run.stat().st_ino == inode
    assert not {"notes.txt", "link"} & {path.name for path in run.iterdir()}
    assert (tmp_path / "corpus.jsonl").exists(), "what a link leads to stays"


def test_a_mistake_found_before_the_first_step_leaves_the_run_directory_free(config):
    with pytest.raises(ValueError, match="max_position"):
        main(replace(config, model=replace(MODEL, max_position=32)))
    main(replace(config, steps=1, data=replace(config.data, max_seqlen=48)))
    assert latest_checkpoint(config.out) is not None


def test_resuming_with_other_settings_says_which_ones(config, capsys):
    main(replace(config, steps=2))
    main(replace(config, steps=3, micro_batches=2, resume=True))
    warning = " ".join(capsys.readouterr().err.split())
    assert "other settings than the run began with: micro_batches = 2 (was 1), steps = 3 (was 2)" in warning


def test_resuming_with_another_model_is_refused_with_the_key(config):
    main(replace(config, steps=1))
    for model, words in (
        (replace(MODEL, dim=48), r"model\.dim = 48 \(was 32\): the model of a run cannot change"),
        (replace(MODEL, moe=replace(MODEL.moe, topk=3)), r"model\.moe\.topk = 3 \(was 2\)"),
    ):
        for dry_run in (False, True):
            with pytest.raises(ValueError, match=words):
                main(replace(config, model=model, resume=True, dry_run=dry_run))
    with pytest.raises(ValueError, match=r"optimiser state of .*optim.kind"):
        main(replace(config, optim=replace(config.optim, kind="muon"), resume=True))


def test_a_diverging_run_stops_with_its_checkpoints_kept(config):
    wild = replace(config, optim=OptimConfig(lr=1e30, warmup_steps=0), save_every=1)
    with pytest.raises(FloatingPointError, match=r"step \d: .*last good checkpoint is .*step-000001.*--resume"):
        main(wild)
    assert latest_checkpoint(wild.out) is not None


@pytest.mark.parametrize("poison", [{"weight_decay": 1e300}, {"lr": 1e300}, {"weight_decay": 1e38, "lr": 1e3}])
def test_weights_that_an_update_made_infinite_are_never_saved(config, poison):
    main(replace(config, steps=1))
    wild = replace(config, steps=5, save_every=1, resume=True, optim=replace(config.optim, **poison))
    with pytest.raises(
        FloatingPointError, match=r"step-000002: .* is not finite.*last good checkpoint is .*step-000001"
    ):
        main(wild)
    main(replace(config, steps=3, resume=True))
    assert latest_checkpoint(config.out).name == "step-000003"


def test_a_dry_run_prints_a_configuration_that_reads_back_and_writes_nothing(config, tmp_path, capsys):
    import tomllib

    main(replace(config, dry_run=True))
    text = capsys.readouterr().out
    assert from_dict(SupervisedConfig, tomllib.loads(text)) == replace(config, dry_run=True)
    assert f"{num_params(MODEL):,} ({num_active_params(MODEL):,} active" in text
    assert "# memory      about" in text
    assert "40 steps = 10,240 tokens" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"init": "somewhere"}, "exactly one of `init`"),
        ({"model": None}, "exactly one of `init`"),
        ({"epochs": 1.0}, "exactly one of steps = 40 and epochs = 1.0"),
        ({"data": DataConfig()}, r"data.sources is empty"),
        ({"resume": True, "overwrite": True}, "drop one"),
        ({"model": replace(MODEL, max_position=32)}, r"max_seqlen = 64: above model.max_position = 32"),
        ({"model": replace(MODEL, vocab_size=100)}, r"vocab_size=100"),
        ({"tokenizer": "no/such/place"}, "no/such/place"),
        ({"init": "no/such/model", "model": None}, "no/such/model"),
    ],
)
def test_wrong_settings_are_errors_that_name_the_value(config, fields, words):
    with pytest.raises(ValueError, match=words):
        main(replace(config, **fields))


def test_a_configuration_survives_toml(config):
    assert from_dict(SupervisedConfig, to_dict(config)) == config


def test_the_second_signal_acts_as_if_nothing_handled_it(config):
    from kogia.train.interrupt import GracefulStop

    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_a_sink_that_is_not_installed_is_said_before_anything_is_made(config, monkeypatch, sink, dry_run):
    for module in [sink, *(module for module in sys.modules if module.startswith(f"{sink}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"pip install 'kogia\[{sink}\]'"):
        main(replace(config, sinks=(sink,), dry_run=dry_run))
    assert not Path(config.out).exists()


def test_a_run_goes_to_tensorboard_too_and_may_be_resumed_without(config, capsys):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main(replace(config, steps=4, sinks=("tensorboard",)))
    shown = events.EventAccumulator(str(Path(config.out) / "tensorboard"))
    shown.Reload()
    for name in ("loss", "val_loss", "grad_norm", "lr"):
        written = [(line["step"], line[name]) for line in read_metrics(config.out) if name in line]
        assert [e.step for e in shown.Scalars(name)] == [step for step, _ in written] != []
        assert [e.value for e in shown.Scalars(name)] == pytest.approx([value for _, value in written])
    main(replace(config, steps=5, resume=True))
    assert "steps = 5 (was 4)" in " ".join(capsys.readouterr().err.split())
    assert "sinks" not in capsys.readouterr().err


def test_settings_that_a_resume_refuses_are_not_put_on_record(config):
    config = replace(config, steps=4, save_every=2, eval_every=0)
    main(config)
    recipe = Path(config.out) / "run.toml"
    kept = recipe.read_bytes()
    for changed, words in (
        (replace(config, optim=replace(config.optim, kind="muon")), "belongs to another model or another optim.kind"),
        (replace(config, data=replace(config.data, max_seqlen=32)), "holds the tokens of other data settings"),
        (replace(config, data=replace(config.data, val_share=0.3)), "holds the tokens of other data settings"),
    ):
        with pytest.raises(ValueError, match=words):
            main(replace(changed, resume=True))
        assert recipe.read_bytes() == kept, "the settings of the run"
    main(replace(config, steps=6, resume=True))
    assert load_toml(recipe, SupervisedConfig).steps == 6


@pytest.mark.parametrize("damaged", ["model.safetensors", "config.json", "tokenizer.json", None])
def test_a_damaged_checkpoint_may_be_deleted_to_resume_from_the_one_before_it(config, damaged):
    config = replace(config, steps=4, save_every=2, eval_every=0)
    main(config)
    last = latest_checkpoint(config.out)
    if damaged is None:
        shutil.rmtree(last)
        last.mkdir()
    else:
        (last / damaged).write_bytes((last / damaged).read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"; or delete {last} to resume from the checkpoint before it"):
        main(replace(config, resume=True))
    shutil.rmtree(last)
    main(replace(config, resume=True))
    assert latest_checkpoint(config.out) == last
