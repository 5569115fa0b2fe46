"""Models by their name on the Hub, from a cache as `huggingface_hub` lays it out. Nothing is asked of a network."""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoint.tiny import shard
from tiny_checkpoint import save_tiny_checkpoint

from kogia.checkpoint.convert import convert
from kogia.checkpoint.directory import load_config, resolve_model_dir, resolve_tokenizer_dir
from kogia.checkpoint.hub import is_hub_name
from kogia.checkpoint.inspection import inspect_model
from kogia.checkpoint.open import open_model
from kogia.cli import main
from kogia.inference.llm import LLM

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a current directory that holds nothing else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def put(cache: Path, name: str, model: Path, without: tuple[str, ...] = ()) -> Path:
    """The snapshot of a model in the cache: links to blobs, and a ref that names its revision."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        if file.name not in without:
            shutil.copy(file, blobs / f"{number:040x}")
            (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (repository / "refs" / "main").write_text(REVISION)
    return snapshot


def test_a_name_in_the_cache_is_its_snapshot_wherever_a_path_is_taken(cache, saved):
    snapshot = put(cache, "deep/tiny-1.5B", saved)
    name = "deep/tiny-1.5B"
    assert resolve_model_dir(name) == resolve_model_dir(Path(name)) == resolve_tokenizer_dir(name) == snapshot
    assert load_config(name) == load_config(saved)
    assert open_model(name, device="cpu").directory == snapshot
    report, own = inspect_model(name), inspect_model(str(saved))
    assert replace(report, name="") == replace(own, name="")
    assert len(LLM(name, device="cpu").generate("say 1")) == 1
    assert load_config(convert(name, "copy")) == load_config(saved)
    assert not Path("deep").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("eval", "deep/tiny", "--dry-run"), 'path = "deep/tiny"'),
        (("curate", "deep/tiny", "--dry-run"), 'path = "deep/tiny"'),
        (("rl", "--init", "deep/tiny", "--dry-run"), 'init = "deep/tiny"'),
        (
            ("sft", "--out", "run", "--init", "deep/tiny", "--data", "rows.jsonl", "--steps", "1", "--dry-run"),
            'init = "deep/tiny"',
        ),
        (("convert", "deep/tiny", "copy", "--dry-run"), "tensors"),
        (("inspect", "deep/tiny"), "tokenizer"),
        (("generate", "deep/tiny", "--prompt", "say", "--max-tokens", "4", "--device", "cpu"), ""),
    ],
)
def test_every_command_takes_the_name(cache, saved, capsys, words, told):
    put(cache, "deep/tiny", saved)
    Path("rows.jsonl").write_text('{"prompt": "say", "completion": "1"}\n')
    assert main(words) in (0, None)
    assert told in capsys.readouterr().out


def test_a_tokenizer_may_have_a_name_too_and_needs_no_model(cache, saved):
    snapshot = put(cache, "deep/words", saved, without=("config.json", "model.safetensors"))
    assert resolve_tokenizer_dir("deep/words") == snapshot
    with pytest.raises(ValueError, match="holds only a part of a model of that name"):
        resolve_model_dir("deep/words")


def test_a_directory_of_that_name_wins_even_where_it_is_no_model(cache, saved):
    put(cache, "deep/tiny", saved)
    shutil.copytree(saved, "deep/tiny")
    assert resolve_model_dir("deep/tiny") == Path("deep/tiny")
    assert resolve_tokenizer_dir("deep/tiny") == Path("deep/tiny")
    Path("deep/tiny/config.json").unlink()
    with pytest.raises(ValueError, match="not a model. Expected config.json"):
        resolve_model_dir("deep/tiny")
    shutil.rmtree("deep/tiny")
    Path("deep/tiny").symlink_to("nowhere")
    with pytest.raises(ValueError, match="not a model"):
        resolve_model_dir("deep/tiny")


@pytest.mark.parametrize("missing", ["model.safetensors", "model-00001.safetensors", "config.json"])
def test_a_snapshot_in_part_is_not_taken_for_a_model(cache, saved, tmp_path, missing):
    model = shutil.copytree(saved, tmp_path / "model")
    if missing.startswith("model-"):
        shard(model)
    put(cache, "deep/tiny", model, without=(missing,))
    with pytest.raises(ValueError, match=r"deep/tiny: no such file .* only a part of .*`hf download deep/tiny`"):
        open_model("deep/tiny", device="cpu")
    if missing != "config.json":
        assert load_config("deep/tiny") == load_config(saved)  # which needs no weights
        assert inspect_model("deep/tiny").config == load_config(saved)


def test_shards_are_found_by_their_index(cache, saved, tmp_path):
    model = shutil.copytree(saved, tmp_path / "model")
    shard(model)
    snapshot = put(cache, "deep/tiny", model)
    assert open_model("deep/tiny", device="cpu").directory == snapshot


def test_a_model_without_tokenizer_file_is_taken_where_the_network_has_no_more(cache, saved):
    snapshot = put(cache, "deep/tiny", saved, without=("tokenizer.json",))
    assert resolve_model_dir("deep/tiny") == snapshot


def test_a_name_that_nobody_has_says_how_to_get_it(cache, saved):
    with pytest.raises(ValueError) as error:
        resolve_model_dir("deep/absent")
    message = str(error.value)
    assert message.startswith("deep/absent: no such file or directory, and the Hugging Face cache does not hold")
    assert "hf download deep/absent" in message
    assert "\n" not in message
    Path("runs").mkdir()
    with pytest.raises(ValueError, match="the Hub was not asked, as there is a directory runs here"):
        resolve_model_dir("runs/misspelt")


@pytest.mark.parametrize(
    "name",
    ["../tiny", "deep/..", "/deep/tiny", "deep/tiny/", "a/b/c", "deep//tiny", "-x/tiny", "deep/.tiny", "deep/a--b",
     "deep/ti ny", "dépôt/tiny", "deep/tiny\n", "deep/x.git", "~/tiny", "tiny", "deep\\tiny", f"deep/{'x' * 97}", ""],
)  # fmt: skip
def test_odd_names_and_paths_out_of_the_cache_are_no_names(cache, saved, name):
    (cache / "models--deep--..").mkdir(parents=True)
    put(cache, "deep/tiny", saved)
    assert not is_hub_name(name)
    with pytest.raises(ValueError, match="no such file or directory; give|not a model"):
        resolve_model_dir(name)


def test_a_link_in_a_snapshot_does_not_lead_out_of_its_model(cache, saved):
    snapshot = put(cache, "deep/tiny", saved, without=("config.json",))
    put(cache, "deep/other", saved)
    (snapshot / "config.json").symlink_to(f"../../../models--deep--other/snapshots/{REVISION}/config.json")
    with pytest.raises(ValueError, match="outside the model directory"):
        load_config("deep/tiny")
