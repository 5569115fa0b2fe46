"""Sampling settings are the same fields, docs and checks in every program that samples."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest

from kogia.config import from_dict, parse_args, to_dict
from kogia.engine.config import FilteredSamplingConfig, SamplingConfig
from kogia.engine.request import SamplingParams
from kogia.eval.config import EvalConfig
from kogia.inference.config import ChatConfig, GenerateConfig
from kogia.rl.config import CurateConfig, RLConfig

PROGRAMS = [GenerateConfig, ChatConfig, EvalConfig, CurateConfig, RLConfig]
FILTERING = [GenerateConfig, ChatConfig, EvalConfig, CurateConfig]
BAD = [
    ("temperature", -0.5),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 1e-40),
    ("temperature", 1e308),
    ("temperature", 1e31),
    ("temperature", True),
    ("max_tokens", 0),
]
BAD_FILTERS = [
    ("top_k", -1),
    ("top_k", 2**63),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("min_p", -0.1),
    ("min_p", 1.5),
]


@pytest.mark.parametrize(("name", "value"), BAD)
@pytest.mark.parametrize("program", [*PROGRAMS, SamplingParams])
def test_a_value_that_cannot_be_sampled_with_is_refused_at_construction(program, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*must be"):
        program(**{"init" if program is RLConfig else "path": "m"} if program in PROGRAMS else {}, **{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_FILTERS)
@pytest.mark.parametrize("program", [*FILTERING, SamplingParams])
def test_a_filter_out_of_its_range_is_refused_at_construction(program, name, value):
    with pytest.raises(ValueError, match=f"{name} = .*must be"):
        program(**{"path": "m"} if program in FILTERING else {}, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("n", 0), ("n", True), ("stop", ("a", ""))])
def test_what_only_generate_has_is_checked_there_too(name, value):
    for make in (SamplingParams, lambda **changes: GenerateConfig("m", **changes)):
        with pytest.raises(ValueError, match=f"{name} = .*must be"):
            make(**{name: value})


OTHER_TYPES = """
import numpy as np
from kogia.engine.grammar import ResponseFormat
from kogia.engine.request import SamplingParams
from kogia.inference.config import GenerateConfig
from kogia.rl.config import RLConfig
refused = [
    ("temperature", "1"), ("max_tokens", 2.5), ("max_tokens", None), ("seed", 1.5), ("seed", "0"), ("n", 10**7),
    ("top_k", 2.0), ("top_p", "1"), ("n", 1.5), ("stop", "x"), ("stop", ["x"]),
]
nothing = [("temperature", None), ("min_p", None)]  # to a command the model's own value
for make, own in ((SamplingParams, nothing), (lambda **changes: GenerateConfig("m", **changes), [])):
    for name, value in refused + own:
        try:
            make(**{name: value})
        except ValueError as error:
            assert str(error).startswith(f"{name} = {value!r}: must be"), error
        else:
            raise AssertionError((name, value))
refused = [
    ("stop_token_ids", [1]), ("stop_token_ids", (2**70,)), ("stop_token_ids", (-1,)), ("stop_token_ids", ("</s>",)),
    ("ignore_eos", "no"), ("logprobs", 1.5), ("logprobs", 21),
]
for name, value in refused:
    try:
        SamplingParams(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name} = {value!r}: must be"), error
    else:
        raise AssertionError((name, value))
for name, value in [("choice", "yes"), ("choice", (1, 2)), ("regex", 5), ("grammar", ("start: A",))]:
    try:
        ResponseFormat(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"response_format.{name} = {value!r}: must be"), error
    else:
        raise AssertionError((name, value))
assert ResponseFormat(choice=["a", "b"]) == ResponseFormat(choice=("a", "b"))
try:
    RLConfig("m", seed=None)
except ValueError as error:
    assert str(error) == "seed = None: must be a whole number", error
else:
    raise AssertionError("a run that promises to repeat itself needs a seed")
params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.int64(2))
assert (params.temperature, params.top_k, params.seed) == (0.5, 3, 2)
"""


def test_values_of_other_types_are_refused_and_numbers_of_numpy_are_numbers():
    # in a process of its own: the type checks of the test run would come first
    done = subprocess.run([sys.executable, "-c", OTHER_TYPES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LONG_VALUES = """
from kogia.engine.request import SamplingParams
for name, value in [
    ("stop", ("x" * 10**6, "")), ("bad_words", "x" * 10**6), ("logit_bias", {i: 1e9 for i in range(10**5)}),
    ("allowed_token_ids", [1] * 10**5), ("cache_salt", [1] * 10**5), ("temperature", "x" * 10**6),
]:
    try:
        SamplingParams(**{name: value})
    except ValueError as error:
        assert str(error).startswith(f"{name} = ") and len(str(error)) < 300, len(str(error))
    else:
        raise AssertionError(name)
"""


def test_an_error_shows_the_beginning_of_a_long_value():
    done = subprocess.run([sys.executable, "-c", LONG_VALUES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["block_size", "max_batch_tokens", "max_sequences", "num_draft_tokens", "num_blocks"])
def test_numbers_of_an_engine_are_whole_and_large_enough(name):
    values = "-1, float('nan'), 2.5, True, '4'"
    source = f"""
from kogia.engine.config import EngineConfig
for value in ({values}):
    try:
        EngineConfig({name}=value)
    except ValueError as error:
        assert str(error).startswith(f"engine.{name} = {{value!r}}: must be at least "), error
    else:
        raise AssertionError(value)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_fields_are_inherited_and_flags_stay_flat(program):
    base = SamplingConfig if program is RLConfig else FilteredSamplingConfig
    names = [field.name for field in fields(base)]
    if program not in (GenerateConfig, ChatConfig):  # where None is the model's own value
        assert issubclass(program, base)
        assert set(names) <= to_dict(program("m", seed=3)).keys()  # in recipes too
    key = "--init" if program is RLConfig else None
    values = {"temperature": 0.25, "max_tokens": 7, "seed": 5, "top_k": 9, "top_p": 0.5, "min_p": 0.125}
    flags = [word for name in names for word in ("--" + name.replace("_", "-"), str(values[name]))]
    config = parse_args(program, [*([key] if key else []), "m", *flags], prog="x", description="")
    assert {name: getattr(config, name) for name in names} == {name: values[name] for name in names}
    assert from_dict(program, to_dict(config)) == config


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_sampling_flag_is_explained(program, capsys):
    with pytest.raises(SystemExit):
        parse_args(program, ["--help"], prog="x", description="")
    lines = " ".join(line.strip("│ ") for line in capsys.readouterr().out.splitlines())
    for field in fields(SamplingConfig if program is RLConfig else FilteredSamplingConfig):
        flag = "--" + field.name.replace("_", "-")
        explained = lines.split(f"{flag} ")[1].split("(default")[0].split(maxsplit=1)
        assert len(explained) == 2, (program, flag)


def test_each_program_keeps_its_own_defaults():
    defaults = {
        program: tuple(getattr(program("m"), name) for name in ("temperature", "max_tokens", "seed"))
        for program in PROGRAMS
    }
    assert defaults == {
        GenerateConfig: (None, 512, None),
        ChatConfig: (None, 2048, None),
        EvalConfig: (1.0, 512, 0),
        CurateConfig: (1.0, 512, 0),
        RLConfig: (1.0, 256, 0),
    }
    assert [program("m").top_p for program in FILTERING] == [None, None, 1.0, 1.0]
    assert GenerateConfig("m").sampling({}) == FilteredSamplingConfig(temperature=0.6, top_p=0.95)
    assert ChatConfig("m").sampling({}) == FilteredSamplingConfig(max_tokens=2048, temperature=0.6, top_p=0.95)
    assert SamplingParams() == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=256, n=1, seed=None)


def test_sampling_params_are_what_the_settings_say_with_the_changes():
    config = CurateConfig("m", temperature=0.5, top_k=4, top_p=0.95, min_p=0.25, max_tokens=9, seed=8)
    expected = SamplingParams(temperature=0.5, top_k=4, top_p=0.95, min_p=0.25, max_tokens=9, seed=8)
    assert SamplingParams.of(config, n=1) == expected
    assert SamplingParams.of(config, n=3, logprobs=True) == replace(expected, n=3, logprobs=True)
    rollout = SamplingParams.of(RLConfig("m", temperature=0.5), n=16)
    assert rollout == SamplingParams(temperature=0.5, max_tokens=256, seed=0, n=16)
    assert SamplingParams.of(CurateConfig("m", top_k=5)).top_k == 5
