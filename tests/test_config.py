import dataclasses
import re
import sys
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from kogia.config import Presets, _toml_value, from_dict, load_toml, parse_args, resolve, save_toml, to_dict
from kogia.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from kogia.model.presets import preset


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius: float = 1.0


@dataclass(frozen=True)
class Box:
    kind: Literal["box"] = "box"
    sides: tuple[int, int] = (1, 2)
    label: str | None = "plain"


@dataclass(frozen=True)
class Source:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0


@dataclass(frozen=True)
class Recipe:
    out: str
    """Where the run goes."""
    steps: int = 10
    save: bool = True
    mode: Literal["fast", "slow", 3] = "fast"
    optim: Optim = Optim(lr=0.5)
    shape: Circle | Box = Box(sides=(7, 8))
    extra: Circle | Box | None = None
    model: Annotated[ModelConfig | None, Presets(preset)] = None
    tasks: tuple[str, ...] = ("countdown",)
    sources: tuple[Source, ...] = ()
    weights: dict[str, float] = field(default_factory=lambda: {"format": 0.1})
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | str | None = 3

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps = {self.steps}: must not be negative")


words = st.text(st.characters(exclude_categories=("Cs",)), max_size=8).filter(lambda s: s != "none")
floats = st.floats(allow_nan=False, allow_infinity=False)
ints = st.integers(-(2**63), 2**63 - 1)
shapes = st.one_of(
    st.builds(Circle, radius=floats), st.builds(Box, sides=st.tuples(ints, ints), label=st.none() | words)
)
scalars = st.one_of(ints, floats, words, st.booleans())
recipes = st.builds(
    Recipe,
    out=words,
    steps=st.integers(0, 2**40),
    save=st.booleans(),
    mode=st.sampled_from(["fast", "slow", 3]),
    optim=st.builds(Optim, lr=floats, betas=st.tuples(floats, floats), clip=st.none() | floats),
    shape=shapes,
    extra=st.none() | shapes,
    model=st.sampled_from(
        [
            None,
            ModelConfig(),
            ModelConfig(moe=None, attention=GQAConfig()),
            ModelConfig(attention=MLAConfig(q_lora_rank=8)),
        ]
    ),
    tasks=st.lists(words, max_size=3).map(tuple),
    sources=st.lists(st.builds(Source, path=st.just(Path("a/b")), weight=floats), max_size=2).map(tuple),
    weights=st.dictionaries(words, floats, max_size=3),
    options=st.dictionaries(words, scalars | st.lists(scalars, max_size=2), max_size=3),
    limit=st.none() | ints | words,
)


@given(recipes)
def test_every_configuration_survives_the_way_through_toml(recipe: Recipe):
    import tomli_w

    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert from_dict(Recipe, tomllib.loads(tomli_w.dumps(to_dict(recipe)))) == recipe


def test_a_saved_file_loads_as_an_equal_value_and_leaves_no_draft(tmp_path: Path):
    recipe = Recipe(out="x", optim=Optim(clip=None), model=ModelConfig(moe=None))
    save_toml(recipe, tmp_path / "run" / "run.toml")
    assert load_toml(tmp_path / "run" / "run.toml", Recipe) == recipe
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["run.toml"]


def test_a_nested_table_changes_only_the_keys_it_names():
    recipe = from_dict(Recipe, {"out": "x", "optim": {"clip": "none"}, "shape": {"sides": [1, 1]}})
    assert recipe.optim == Optim(lr=0.5, clip=None)
    assert recipe.shape == Box(sides=(1, 1))


def test_the_member_of_a_union_follows_kind_and_takes_its_own_defaults():
    assert from_dict(Recipe, {"out": "x", "shape": {"kind": "circle"}}).shape == Circle(radius=1.0)
    assert from_dict(Recipe, {"out": "x", "extra": {"kind": "box", "label": "none"}}).extra == Box(label=None)


def test_numbers_are_read_as_declared():
    recipe = from_dict(Recipe, {"out": "x", "optim": {"lr": 1}, "limit": "many"})
    assert recipe.optim.lr == 1.0
    assert type(recipe.optim.lr) is float
    assert recipe.limit == "many"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"out": "x", "stpes": 3}, "unknown key 'stpes' at the top level; did you mean 'steps'?"),
        ({"out": "x", "optim": {"learning": 3}}, "unknown key 'learning' in [optim]; known: lr, betas, clip"),
        ({"out": "x", "model": {"attention": {"heads": 3}}}, "unknown key 'heads' in [model.attention]; did you mean"),
        ({}, "out is missing: it is required and has no default"),
        ({"out": 3}, "out = 3 (int): expected a string"),
        ({"out": "x", "steps": True}, "steps = True (bool): expected an int"),
        ({"out": "x", "steps": 1.0}, "steps = 1.0 (float): expected an int"),
        ({"out": "x", "save": 1}, "save = 1 (int): expected true or false"),
        ({"out": "x", "optim": {"lr": True}}, "optim.lr = True (bool): expected a number"),
        ({"out": "x", "optim": {"lr": "fast"}}, "optim.lr = 'fast' (str): expected a number"),
        ({"out": "x", "optim": 3}, "optim = 3 (int): expected a table (Optim)"),
        ({"out": "x", "optim": {"betas": [0.9]}}, "optim.betas = [0.9] (list): expected a list of 2 values"),
        ({"out": "x", "tasks": "countdown"}, "tasks = 'countdown' (str): expected a list"),
        ({"out": "x", "tasks": ["a", 3]}, "tasks[1] = 3 (int): expected a string"),
        ({"out": "x", "mode": "fsat"}, "mode = 'fsat' (str): expected one of 'fast', 'slow', 3; did you mean 'fast'?"),
        ({"out": "x", "mode": 3.0}, "mode = 3.0 (float): expected one of"),
        ({"out": "x", "sources": [{"weight": 1}]}, "sources[0].path is missing"),
        ({"out": "x", "weights": {"a": "b"}}, "weights.a = 'b' (str): expected a number"),
        ({"out": "x", "shape": {"kind": "oval"}}, "shape.kind = 'oval' (str): expected one of 'circle', 'box'"),
        ({"out": "x", "extra": {"radius": 1}}, "extra.kind is missing: write one of 'circle', 'box'"),
        ({"out": "x", "extra": "circle"}, "extra = 'circle' (str): expected Circle or Box"),
        ({"out": "x", "limit": 1.5}, "limit = 1.5 (float): expected int or str"),
        ({"out": "none", "steps": -1}, "steps = -1: must not be negative"),
    ],
)
def test_a_mistake_is_named_with_its_place(data: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        from_dict(Recipe, data)
    assert message in str(error.value)


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
@pytest.mark.parametrize(
    ("table", "where"),
    [
        ("optim = {{ lr = {} }}", "optim.lr"),
        ("optim = {{ betas = [0.9, {}] }}", "optim.betas[1]"),
        ("optim = {{ clip = {} }}", "optim.clip"),
        ('sources = [{{ path = "a" }}, {{ path = "b", weight = {} }}]', "sources[1].weight"),
        ("weights = {{ format = {} }}", "weights.format"),
        ("options = {{ depth = [1, {}] }}", "options.depth[1]"),
        ('shape = {{ kind = "circle", radius = {} }}', "shape.radius"),
    ],
)
def test_no_number_of_a_file_may_be_infinite_or_none(tmp_path: Path, table: str, where: str, number: str):
    file = tmp_path / "recipe.toml"
    file.write_text(f'out = "x"\n{table.format(number)}\n')
    for read in (lambda: load_toml(file, Recipe), lambda: parse_args(Recipe, [str(file)], prog="p", description="")):
        with pytest.raises(ValueError, match=re.escape(f"{where} = {number}: must be a finite number")):
            read()


@pytest.mark.parametrize("number", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--optim.lr={}"], "optim.lr"),
        (["--optim.betas", "0.9", "{}"], "optim.betas[1]"),
        (["--shape.kind", "circle", "--shape.radius={}"], "shape.radius"),
        (["--weights.format", "{}"], "weights.format"),
    ],
)
def test_no_number_of_a_flag_may_be_infinite_or_none(flags: list[str], where: str, number: str):
    words = ["--out", "x", *(flag.format(number) for flag in flags)]
    with pytest.raises(ValueError, match=re.escape(f"{where} = {float(number)}: must be a finite number")):
        parse_args(Recipe, words, prog="p", description="")


@pytest.mark.parametrize("text", ['out = "x"\nsteps = 3\n', '# c\r\nout = "x"\r\nsteps = 3\r\n'])
def test_a_byte_order_mark_before_a_file_is_skipped(tmp_path: Path, text: str):
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_toml(path, Recipe) == parse_args(Recipe, [str(path)], prog="p", description="d") == Recipe("x", steps=3)


def test_bytes_that_are_no_text_are_a_mistake_that_begins_with_the_path(tmp_path: Path):
    path = tmp_path / "a.toml"
    path.write_bytes(b'out = "\xff"')
    with pytest.raises(ValueError, match=r"a\.toml: .*can't decode byte 0xff"):
        load_toml(path, Recipe)


def test_brackets_too_deep_to_be_read_are_a_mistake_in_a_file_and_a_word_in_a_flag(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("size = " + "[" * 5000)
    with pytest.raises(ValueError, match=r"recipe.toml: .*too deep"):
        load_toml(path, Recipe)
    assert _toml_value("[" * 5000) == "[" * 5000


def test_a_mistake_in_a_file_begins_with_the_path(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("out = \n")
    with pytest.raises(ValueError, match="recipe.toml: Invalid value"):
        load_toml(path, Recipe)
    path.write_text("out = 'x'\nsteps = 'many'\n")
    with pytest.raises(ValueError, match="recipe.toml: steps = 'many'"):
        load_toml(path, Recipe)
    with pytest.raises(FileNotFoundError, match="absent.toml"):
        load_toml(tmp_path / "absent.toml", Recipe)


def test_the_word_none_is_refused_where_it_would_not_come_back():
    assert to_dict(Recipe(out="none"))["out"] == "none"
    with pytest.raises(ValueError, match="limit = 'none'"):
        to_dict(Recipe(out="x", limit="none"))


# The command line ---------------------------------------------------------------------------------------------------


def parse(*argv: str) -> Recipe:
    return parse_args(Recipe, argv, prog="kogia test", description="A test.")


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("steps = 4\n[optim]\nlr = 2\n[model.attention]\nkind = 'gqa'\n[[sources]]\npath = 'a'\n")
    recipe = parse(str(path), "--out", "x", "--optim.clip", "3", "--model.dim", "64", "--sources.0.weight", "2")
    assert recipe.optim == Optim(lr=2.0, clip=3.0)
    assert recipe.model == ModelConfig(attention=GQAConfig(), dim=64)
    assert recipe.sources == (Source(Path("a"), 2.0),)
    assert (recipe.steps, recipe.out, recipe.tasks) == (4, "x", ("countdown",))


def test_a_recipe_that_only_holds_with_the_flags_is_accepted(tmp_path: Path, capsys: Any):
    path = tmp_path / "recipe.toml"
    path.write_text("out = 'x'\nsteps = -5\n")
    assert parse(str(path), "--steps", "5").steps == 5
    with pytest.raises(SystemExit, match="2"):
        parse(str(path))
    assert "steps = -5: must not be negative" in capsys.readouterr().err


def test_structural_flags_switch_kinds_parts_and_entries():
    recipe = parse(
        "--out",
        "x",
        "--shape.radius",
        "2.5",
        "--shape.kind=circle",
        "--model.moe",
        "none",
        "--options.num-numbers",
        "4",
    )
    assert recipe.shape == Circle(radius=2.5)
    assert recipe.model == ModelConfig(moe=None)
    assert recipe.options == {"num_numbers": 4}
    more = parse("--out", "x", "--options.names", "[1, 2]", "--options.word=abc", "--weights.language", "2")
    assert more.options == {"names": [1, 2], "word": "abc"}
    assert more.weights == {"format": 0.1, "language": 2.0}
    assert parse("--out", "x", "--model.moe.topk", "2").model == ModelConfig(moe=MoEConfig(topk=2))
    assert parse("--out", "x", "--limit", "None").limit is None


SIZES = {"small": Optim(lr=0.1), "large": Optim(lr=0.9, clip=None)}


@dataclass(frozen=True)
class Part:
    optim: Annotated[Optim, Presets(SIZES.__getitem__)] = Optim(lr=0.5)
    other: Optim = Optim()


UNCLIPPED = Part(Optim(lr=0.5, clip=None))


@dataclass(frozen=True)
class Inner:
    dry_run: bool = False
    overlap: bool | None = None


@dataclass(frozen=True)
class Spelled:
    """One field of each kind that has words for values."""

    path: tyro.conf.Positional[str] = "here"
    quiet: bool = False
    checked: bool = True
    thinking: bool | None = None
    dtype: Literal["auto", "bfloat16", "bf16"] | None = "auto"
    limit: int | None = 3
    system: str | None = "Be brief."
    part: Part = Part()
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--thinking false", Spelled(thinking=False)),
        ("--thinking True", Spelled(thinking=True)),
        ("--thinking=off", Spelled(thinking=False)),
        ("--thinking", Spelled(thinking=True)),
        ("--thinking there", Spelled("there", thinking=True)),
        ("--no-thinking there", Spelled("there", thinking=False)),
        ("--no_thinking", Spelled(thinking=False)),
        ("--thinking none", Spelled()),
        ("--quiet there", Spelled("there", quiet=True)),
        ("--quiet true there", Spelled("there", quiet=True)),
        ("--quiet=False --checked NO", Spelled(checked=False)),
        ("--no-checked --no-quiet", Spelled(checked=False)),
        ("--dtype BF16", Spelled(dtype="bf16")),
        ("--dtype=BFloat16 there", Spelled("there", dtype="bfloat16")),
        ("--dtype NONE --limit none --system None", Spelled(dtype=None, limit=None, system=None)),
        ("--inner.overlap false --inner.dry-run true", Spelled(inner=Inner(dry_run=True, overlap=False))),
        ("--inner.no-overlap --inner.dry_run", Spelled(inner=Inner(dry_run=True, overlap=False))),
        ("--inner.overlap --inner.dry-run false", Spelled(inner=Inner(overlap=True))),
        ("--parts.1.overlap no --part.optim.clip none", Spelled(parts=(Inner(), Inner(overlap=False)), part=UNCLIPPED)),
    ],
)
def test_a_value_is_understood_as_people_write_it(line: str, expected: Spelled):
    assert parse_args(Spelled, line.split(), prog="p", description="d") == expected


@pytest.mark.parametrize("line", ["--quiet maybe x", "--thinking=maybe", "--dtype bf17", "--limit nil"])
def test_a_word_that_is_no_value_is_still_a_mistake(line: str):
    with pytest.raises(SystemExit, match="2"):
        parse_args(Spelled, line.split(), prog="p", description="d")


@dataclass(frozen=True)
class Numbers:
    name: tyro.conf.Positional[str] = ""
    counts: tuple[int, ...] = ()
    shares: tuple[float, float] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x --counts 2,4,6", Numbers("x", (2, 4, 6))),
        ("--counts=2,4", Numbers(counts=(2, 4))),
        ("--counts 2 4 6", Numbers(counts=(2, 4, 6))),
        ("--shares 0.5,0.75 --counts 3", Numbers(counts=(3,), shares=(0.5, 0.75))),
    ],
)
def test_numbers_are_understood_with_commas_and_without(line: str, expected: Numbers):
    assert parse_args(Numbers, line.split(), prog="p", description="d") == expected


@pytest.mark.parametrize("line", ["--counts 2,x", "--counts 2,,4", "--shares 1,"])
def test_what_is_no_list_of_numbers_is_a_mistake(line: str):
    with pytest.raises(SystemExit, match="2"):
        parse_args(Numbers, line.split(), prog="p", description="d")


@pytest.mark.parametrize("word", ["--quiet=maybe", "--checked=", "--inner.dry-run=2"])
def test_a_switch_takes_no_other_value(word: str):
    with pytest.raises(ValueError, match=f"{word}: .* takes true or false"):
        parse_args(Spelled, [word], prog="p", description="d")


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (["--out", "x", "--optim.lrr", "3"], ["--optim.lrr", "--optim.lr"]),
        (["--out", "x", "--model.dmi", "3"], ["--model.dmi", "--model.dim"]),
        (["--out", "x", "--steps", "many"], ["--steps", "many"]),
        ([], ["--out", "required"]),
    ],
)
def test_a_mistaken_flag_exits_with_2_and_a_suggestion(argv: list[str], messages: list[str], capsys: Any):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert all(message in printed.out + printed.err for message in messages)


def test_a_recipe_starts_from_a_preset_and_flags_change_it(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("out = 'x'\n[model]\npreset = 'deepseek-v2-lite'\nvocab_size = 512\n[model.moe]\ntopk = 2\n")
    v2_lite = preset("deepseek-v2-lite")
    assert v2_lite.moe is not None
    expected = replace(v2_lite, vocab_size=512, moe=replace(v2_lite.moe, topk=2))
    assert load_toml(path, Recipe).model == expected == parse(str(path)).model
    assert from_dict(Recipe, to_dict(parse(str(path)))).model == expected  # written out in full: presets may change
    changed = parse(
        "--out", "x", "--model.preset", "llama-3-8b", "--model.num-layers", "2", "--model.attention.num-heads=8"
    )
    llama = preset("llama-3-8b")
    assert changed.model == replace(llama, num_layers=2, attention=replace(llama.attention, num_heads=8))
    dense = parse(str(path), "--model.moe", "none", "--model.attention.rope-scaling", "none").model
    assert dense == replace(expected, moe=None, attention=replace(v2_lite.attention, rope_scaling=None))


def test_a_mistaken_preset_is_named_with_its_place(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("out = 'x'\n[model]\npreset = 'deepseek-v2-light'\n")
    with pytest.raises(ValueError, match="recipe.toml: .*no preset is named 'deepseek-v2-light'.*'deepseek-v2-lite'"):
        parse(str(path))
    with pytest.raises(ValueError, match=r"model.preset = 2 \(int\): expected a string"):
        from_dict(Recipe, {"out": "x", "model": {"preset": 2}})
    with pytest.raises(ValueError, match="unknown key 'preset' in \\[optim\\]"):
        from_dict(Recipe, {"out": "x", "optim": {"preset": "fast"}})


@dataclass(frozen=True)
class Whole:
    part: Part = Part()
    parts: tuple[Part, ...] = ()


def test_any_field_may_be_marked_to_start_from_a_named_value():
    flags = ["--part.optim.preset", "large", "--part.optim.lr", "2.0"]
    parsed = parse_args(Whole, flags, prog="p", description="d")
    assert parsed.part == Part(Optim(lr=2.0, clip=None))
    listed = from_dict(Whole, {"parts": [{"optim": {"preset": "small", "clip": 3}}, {"optim": {"lr": 7.0}}]})
    assert listed.parts == (Part(Optim(lr=0.1, clip=3.0)), Part(Optim(lr=7.0)))
    assert from_dict(Whole, to_dict(listed)) == listed
    with pytest.raises(ValueError, match="unknown key 'preset' in \\[part.other\\]"):
        from_dict(Whole, {"part": {"other": {"preset": "small"}}})
    with pytest.raises(ValueError, match="unknown key 'preset' in \\[part\\]"):
        from_dict(Whole, {"part": {"preset": "small"}})


def test_a_mistake_in_the_recipe_is_a_value_error_with_the_path(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("out = 'x'\noptmi = {}\n")
    with pytest.raises(ValueError, match="recipe.toml: unknown key 'optmi' at the top level; did you mean 'optim'"):
        parse(str(path))
    with pytest.raises(ValueError, match="shape.kind = 'oval'"):
        parse("--out", "x", "--shape.kind", "oval")


def test_help_shows_docstrings_and_defaults(capsys: Any):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "Where the run goes." in text
    assert "--optim.lr" in text
    assert "0.5" in text


def test_help_fills_its_lines_whatever_the_lines_of_the_docstring_are(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    @dataclass(frozen=True)
    class Inner:
        depth: int = 1
        """How deep
        it goes."""

    @dataclass(frozen=True)
    class Page:
        inner: Inner = Inner()
        width: int = 2
        """How wide
        it is:
        `a` or 1."""
        one: int = 3
        """One line."""

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_args(Page, ["--help"], prog="p", description="d")
    text = capsys.readouterr().out
    for told in ("How deep it goes.", "How wide it is: `a` or 1.", "One line."):
        assert told in text


def test_a_positional_field_reads_the_first_plain_word():
    @dataclass(frozen=True)
    class Page:
        path: tyro.conf.Positional[str]
        quiet: bool = False

    assert parse_args(Page, ["runs/x", "--quiet"], prog="p", description="d") == Page("runs/x", True)


# resolve ------------------------------------------------------------------------------------------------------------


def test_resolve_finds_a_class_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_sudoku_task.py").write_text("class Sudoku:\n    size = 9\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert resolve("my_sudoku_task:Sudoku").size == 9
    with pytest.raises(ValueError, match=r"has no 'Sudoko'; did you mean 'Sudoku'"):
        resolve("my_sudoku_task:Sudoko")


def test_resolve_says_why_a_module_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_broken_task.py").write_text("raise RuntimeError('no data here')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match=r"'my_broken_task:T': .*RuntimeError: no data here.*current directory"):
        resolve("my_broken_task:T")
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        resolve("no_such_package.thing:T")
    with pytest.raises(ValueError, match="write it as 'module:Name'"):
        resolve("countdown")


def test_the_form_that_flags_fill_in_never_leaks():
    recipe = parse("--out", "x", "--model.dim", "64")
    assert all(value is not tyro.MISSING for value in dataclasses.asdict(recipe).values())
    assert recipe == from_dict(Recipe, to_dict(recipe))


@dataclasses.dataclass(frozen=True)
class Tabled:
    options: dict[str, dict[str, int | str | float | bool]] = dataclasses.field(default_factory=dict)


def test_a_flag_sets_one_entry_of_a_table_of_tables_whose_name_may_hold_dots():
    flags = ["--options.my_pkg.tasks:Sudoku.size", "9", "--options.countdown.max-target", "50"]
    parsed = parse_args(Tabled, flags, prog="p", description="d")
    assert parsed.options == {"my_pkg.tasks:Sudoku": {"size": 9}, "countdown": {"max_target": 50}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("false", False), ("FALSE", False), ("0.5", 0.5), ("07", "07"), ("2024-01-01", "2024-01-01")],
)
def test_an_entry_of_a_free_table_is_what_its_text_says(text: str, value: Any):
    parsed = parse("--out", "x", "--options.given", text).options["given"]
    assert (parsed, type(parsed)) == (value, type(value))
    tables = parse_args(Tabled, ["--options.countdown.given", text], prog="p", description="d").options
    assert tables == {"countdown": {"given": value}}


@pytest.mark.parametrize("word", ["--options.max-target=50", "--options.numbers=4", "--options.countdown=size=4"])
def test_an_option_without_its_table_is_asked_whose_it_is(word: str):
    with pytest.raises(ValueError, match=r"whose\? Write --options\.NAME\.KEY VALUE"):
        parse_args(Tabled, [word], prog="p", description="d")


def test_a_whole_table_of_a_table_of_tables_may_be_given_at_once():
    words = ["--options.a.b:C", "{size = 4, name = 'x'}", "--options.a.b:C.size", "5", "--options.d={on = true}"]
    parsed = parse_args(Tabled, words, prog="p", description="d")
    assert parsed.options == {"a.b:C": {"size": 5, "name": "x"}, "d": {"on": True}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("options = 5", "options = 5 (int): expected a table"),
        ("options.countdown = 5", "options.countdown = 5 (int): expected a table"),
        ("options.countdown = [1]", "options.countdown = [1] (list): expected a table"),
    ],
)
def test_a_flag_does_not_hide_what_is_wrong_with_a_recipes_table(tmp_path: Path, recipe: str, message: str):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    with pytest.raises(ValueError) as error:
        parse_args(Tabled, [str(path), "--options.countdown.size", "3"], prog="p", description="d")
    assert message in str(error.value)
