"""`kogia prepare` from sources to what pretraining reads."""

import gzip
import json
import os
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kogia.cli import main as kogia
from kogia.config import from_dict, parse_toml
from kogia.data.config import DataConfig, SourceConfig
from kogia.data.loader import gather_batch
from kogia.data.shards import build_shards
from kogia.files import exchange
from kogia.prepare import chunks, run
from kogia.prepare.config import EvaluationConfig, PrepareConfig, PreparedSource
from kogia.text.tokenizer import Tokenizer, train_bpe

WORDS = [f"{a}{b}" for a in ("ba", "de", "ki", "lo", "mu", "ne") for b in ("ra", "so", "ti", "ve", "wu", "za", "fo")]
SECRET = "on which day of the week does the tallest whale sing its longest song"


def story(seed: int, length: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of plain rows with every kind of text that is to be removed, chats, and an evaluation set."""
    folder = tmp_path_factory.mktemp("corpus")
    alike = story(1).split()
    alike[7] = "other"
    texts = [
        story(0),
        story(1),
        " \n",
        story(0),
        " ".join(alike),
        f"{story(2)} {SECRET} {story(3)}",
        *map(story, range(9, 40)),
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with gzip.open(folder / "b.jsonl.gz", "wt") as rows:
        for seed in (*range(40, 60), 0):
            rows.write(json.dumps({"text": story(seed)}) + "\n")
    chats = [{"prompt": f"say {i}", "completion": f"{story(i, 8)}</think>{i}"} for i in range(70, 80)]
    chats.append({"prompt": "say much", "completion": story(80, 400)})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "test.jsonl").write_text(json.dumps({"question": f"{SECRET}?"}) + "\n")
    return folder


@pytest.fixture
def config(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    sources = (PreparedSource(str(corpus / "[ab].jsonl*")), PreparedSource(str(corpus / "chats.jsonl"), weight=2.0))
    return PrepareConfig(
        out=str(tmp_path / "out"),
        sources=sources,
        vocab_size=400,
        evaluations=(EvaluationConfig(str(corpus / "test.jsonl")),),
        max_seqlen=300,
        val_share=0.1,
        workers=1,
        quiet=True,
    )


def files(folder: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def texts(shard, tokenizer) -> list[str]:
    batches = [gather_batch(shard, np.array([i])) for i in range(shard.num_sequences)]
    return [tokenizer.decode(b.tokens.token_ids.tolist(), skip_special=True) for b in batches]


def test_equal_alike_empty_and_contaminated_texts_are_gone_and_pretraining_reads_the_rest(config, corpus, capsys):
    run.main(config)
    report = json.loads((Path(config.out) / "report.json").read_text())
    books, chats = report["sources"]
    assert books["documents"] == 58
    assert books["removed"] == {"empty": 1, "contaminated": 1, "equal": 2, "alike": 1}
    assert (chats["documents"], chats["kept"], chats["too_long_replies"]) == (11, 11, 1)
    examples = {(each["reason"], each["where"].rpartition("/")[2]): each for each in books["examples"]}
    assert examples["equal", "b.jsonl.gz, line 21"]["like"].endswith("a.jsonl, line 1")
    assert 0.7 < examples["alike", "a.jsonl, line 5"]["similarity"] < 1
    assert examples["contaminated", "a.jsonl, line 6"]["words"] == " ".join(SECRET.split()[:10])
    assert report["evaluations"][0] | {"spec": ""} == {
        "spec": "", "items": 1, "runs": 5, "phrases": 0, "too_short": 0, "removed": 1, "found": 1,
    }  # fmt: skip
    assert not (Path(config.out) / "parts").exists()
    tokenizer = Tokenizer.load(Path(config.out) / "tokenizer")
    data = DataConfig(files=(config.out,), batch_tokens=512, max_seqlen=512)
    shards = build_shards(data, tokenizer, Path(config.out).with_name("run") / "data")
    found = [*texts(shards["train"], tokenizer), *texts(shards["val"], tokenizer)]
    plain = {text for text in found if "say" not in text}
    assert plain == {story(seed) for seed in (0, 1, *range(9, 60))}
    assert len(found) == len(plain) + 10
    assert shards["train"].weights == (1.0, 2.0)
    assert len(shards["train"].source_ends) == 2
    assert "pretrain --data" in capsys.readouterr().err


def test_two_workers_or_a_kill_between_any_two_parts_leave_the_same_bits(config, tmp_path, monkeypatch):
    run.main(config)
    expected = files(config.out)
    second = replace(config, out=str(tmp_path / "second"), workers=2)
    asked = run.Workers._ask
    done = []

    def dies(self, chunk, path, near):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path)
        return asked(self, chunk, path, near)

    monkeypatch.setattr(run.Workers, "_ask", dies)
    with pytest.raises(KeyboardInterrupt):
        run.main(second)
    assert len(list((tmp_path / "second" / "parts").glob("*.npz"))) == 3 + 1  # the evaluation sets' among them
    monkeypatch.setattr(run.Workers, "_ask", asked)
    run.main(second)
    found = files(second.out)
    differing = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    assert differing == {"prepare.toml"}, "which names `out` and `workers`"
    run.main(second)  # nothing is left to do
    assert files(second.out) == found


@pytest.mark.parametrize("name", ["meta.json", "report.json", "train/tokens.bin", "val/offsets.bin", "val/meta.json"])
def test_the_same_command_makes_damaged_data_anew(config, name, capsys):
    run.main(config)
    expected, file = files(config.out), Path(config.out) / name
    file.write_bytes(file.read_bytes()[:-3])
    run.main(config)
    assert files(config.out) == expected
    assert "damaged" in (told := capsys.readouterr().err) and "the data are made anew" in told


def test_splits_that_were_exchanged_are_no_finished_data_and_damaged_notes_are_named(config, tmp_path):
    run.main(config)
    out, expected = Path(config.out), files(config.out)
    exchange(out / "train", out / "val")
    with pytest.raises(ValueError, match="not those that it was finished with"):
        build_shards(DataConfig(files=(config.out,)), Tokenizer.load(out / "tokenizer"), tmp_path / "run")
    run.main(config)
    assert files(config.out) == expected
    (out / "inputs.json").write_text("[")
    with pytest.raises(ValueError, match=r"inputs.json: damaged .*add --overwrite"):
        run.main(config)


def test_other_settings_or_files_than_it_was_begun_with_are_named(config, corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    config = replace(config, sources=(PreparedSource(str(copy / "a.jsonl")),))
    run.main(config)
    with pytest.raises(ValueError, match=r"other settings: ngram = 13 \(was 10\), val_share = 0.2 \(was 0.1\)"):
        run.main(replace(config, ngram=13, val_share=0.2))
    os.utime(copy / "a.jsonl", (1, 1))
    with pytest.raises(ValueError, match=r"a\.jsonl changed since it was begun.*--overwrite"):
        run.main(config)
    before = files(config.out)
    run.main(replace(config, overwrite=True))
    assert {k: v for k, v in files(config.out).items() if k != "inputs.json"} == {
        k: v for k, v in before.items() if k != "inputs.json"
    }


@pytest.mark.parametrize(("mixture", "share"), [("tokens", 0.75), ("documents", None)])
def test_weights_may_be_parts_of_the_tokens_or_documents_and_change_without_tokenising(config, mixture, share):
    run.main(config)
    tokens = (Path(config.out) / "train" / "tokens.bin").stat().st_mtime_ns
    sources = (config.sources[0], replace(config.sources[1], weight=3.0))
    run.main(replace(config, sources=sources, mixture=mixture))
    assert (Path(config.out) / "train" / "tokens.bin").stat().st_mtime_ns == tokens
    one, two = json.loads((Path(config.out) / "report.json").read_text())["sources"]
    if share is not None:
        assert two["share"] == pytest.approx(share, abs=1e-4)
        assert sum(s["epochs"] * s["tokens"] for s in (one, two)) == pytest.approx(
            one["tokens"] + two["tokens"], rel=1e-4
        )
    visits = [s["epochs"] * (s["kept"] - s["held_out"]) for s in (one, two)]
    if share is None:
        assert visits[1] / visits[0] == pytest.approx(3.0, rel=1e-4)
    assert json.loads((Path(config.out) / "meta.json").read_text())["weights"] == [one["epochs"], two["epochs"]]


def test_a_generator_is_called_in_parts_with_seeds_of_their_own_and_never_repeats(config, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 30)
    monkeypatch.chdir(Path(__file__).parent)
    source = PreparedSource("tales:tales", num=100, seed=5, dedup="exact")
    run.main(replace(config, sources=(source,), evaluations=(), val_share=0.0))
    (told,) = json.loads((Path(config.out) / "report.json").read_text())["sources"]
    assert (told["documents"], told["kept"]) == (100, 100)
    sources, trained = (replace(source, spec="tales:broken"),), str(Path(config.out) / "tokenizer")
    again = replace(config, out=f"{config.out}2", sources=sources, tokenizer=trained, vocab_size=None, evaluations=())
    with pytest.raises(ValueError, match="broken: RuntimeError: the dragon ate it"):
        run.main(again)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"text": "fine"}\n{"text": 4}\n', r"bad\.jsonl, line 2: text is 4 \(int\): must be text"),
        ('{"text": "fine"}\n{"text"', r"bad\.jsonl, line 2: not JSON"),
        ("", r"bad\.jsonl: no document in it"),
        ('{"text": " "}\n', "no training document is left"),
    ],
)
def test_bad_rows_are_errors_that_name_file_line_and_rule(config, tmp_path, rows, words):
    (tmp_path / "bad.jsonl").write_text(rows)
    spec = str(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=words):
        run.main(replace(config, sources=(PreparedSource(spec),)))


def test_a_dry_run_says_what_would_be_read_and_written_and_writes_nothing(config, corpus, capsys):
    run.main(replace(config, dry_run=True))
    told = capsys.readouterr().out
    assert "2 files" in told
    assert "test.jsonl: 10 words in a row" in told
    assert "of disk while at work" in told
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data a.jsonl", "exactly one of tokenizer"),
        ("--vocab-size 400", "sources is empty"),
        ("--data a.jsonl --vocab-size 20", "vocab_size=20: must hold"),
        ("--data none-*.jsonl --vocab-size 400", "no file of this pattern"),
        ("--data hf:org/none --vocab-size 400", "the Hugging Face Hub could not be asked"),
        ("--data hf:none --vocab-size 400", "write it as hf:org/name"),
        ("--data a.jsonl --vocab-size 400 --against gsm9k", "did you mean 'gsm8k'"),
    ],
)
def test_what_must_fail_fails_before_anything_is_written(corpus, monkeypatch, capsys, words, message, tmp_path):
    monkeypatch.chdir(corpus)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert kogia(["prepare", "--out", str(tmp_path / "new"), *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_too_little_room_is_told_before_the_work(config, monkeypatch):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match=r"takes about .* of disk, and 0 MiB are free"):
        run.main(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("limit", [9_000, 30_000])
def test_a_disk_that_fills_up_is_named_and_the_same_command_goes_on_once_there_is_room(config, limit):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))  # the kernel refuses to grow a file beyond it
    try:
        with pytest.raises(OSError, match=r"could not be written \(File too large\); free some disk space"):
            run.main(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    run.main(config)
    assert json.loads((Path(config.out) / "meta.json").read_text())["tokens"] > 1000


@pytest.mark.parametrize("wrong", [{"ngram": 2}, {"val_share": 1.0}, {"near_threshold": 0.0}, {"workers": 0}])
def test_numbers_out_of_range_are_refused_by_name(config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(config, **wrong)


def test_prepared_data_stand_alone_and_are_refused_unfinished_or_with_another_tokenizer(config, corpus, tmp_path):
    run.main(config)
    tokenizer, place = Tokenizer.load(Path(config.out) / "tokenizer"), tmp_path / "run"
    data = DataConfig(files=(config.out,), max_seqlen=256)
    build_shards(data, tokenizer, place)
    with pytest.raises(ValueError, match="stands alone; add the others to its recipe"):
        build_shards(DataConfig(files=(config.out, str(corpus / "a.jsonl"))), tokenizer, place)
    with pytest.raises(ValueError, match="takes no weight, num or other setting"):
        build_shards(DataConfig((SourceConfig(config.out, weight=2.0),)), tokenizer, place)
    with pytest.raises(ValueError, match="has held out its own documents"):
        build_shards(replace(data, val_share=0.1), tokenizer, place)
    with pytest.raises(ValueError, match="another tokenizer than the model's"):
        build_shards(data, train_bpe(["a b"], 300), place)
    with pytest.raises(ValueError, match="is prepared already; name what it was made of"):
        run.main(replace(config, out=str(tmp_path / "again"), sources=(PreparedSource(config.out),)))
    (Path(config.out) / "meta.json").unlink()
    with pytest.raises(ValueError, match="was not finished; run `kogia prepare"):
        build_shards(data, tokenizer, place)
    run.main(replace(config, overwrite=True, val_share=0.2))
    with pytest.raises(ValueError, match="holds the tokens of other data"):
        build_shards(data, tokenizer, place)


def test_pretraining_takes_what_was_prepared_with_its_tokenizer_and_resumes_exactly(config, tmp_path, capsys):
    run.main(config)
    model = (
        "--model.preset kogia-demo --model.vocab-size 400 --model.num-layers 2 --model.dim 32 --data.batch-tokens 512"
    )
    rest = f"--data {config.out} {model} --save-every 2 --threads 1 --quiet --data.packing best_fit"
    for name, steps, more in (("whole", 6, ""), ("part", 6, ""), ("part", 6, "--resume")):
        out = tmp_path / name
        if more:
            shutil.rmtree(out / "checkpoints" / "step-000006")
        words = f"pretrain --out {out} --steps {steps} {rest} {more}"
        assert kogia(words.split()) == 0
    told = capsys.readouterr().err
    assert "epochs of" in told
    weights = [tmp_path / name / "checkpoints" / "step-000006" / "model.safetensors" for name in ("whole", "part")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert kogia(f"pretrain --out {tmp_path / 'small'} --steps 1 {rest} --model.vocab-size 280".split()) == 2
    assert "they do not belong together" in capsys.readouterr().err


def test_the_recipe_of_the_page_is_one():
    page = (Path(__file__).parents[2] / "docs" / "prepare.md").read_text(encoding="utf-8")
    recipe = page.partition("```toml\n")[2].partition("```")[0]
    config = from_dict(PrepareConfig, parse_toml(recipe))
    config.check_complete()
    assert [config.level(source) for source in config.sources] == ["near", "near", "exact"]
    assert len(config.evaluations) == 2
