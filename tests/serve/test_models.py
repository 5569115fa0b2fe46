"""Several models by name: loaded when asked for, unloaded for another, never while they answer."""

import asyncio
import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import pytest
from inference.tiny import CONFIG
from serve.asks import HELLO, events, post, refusal, until
from serve.server import serving
from serve.test_metrics import scrape, value

from kogia import cli
from kogia.checkpoint.hf import load_model as load_weights
from kogia.checkpoint.hf import loaded_bytes, read_stored, save_model
from kogia.engine.config import EngineConfig
from kogia.model.transformer import build_model
from kogia.serve import models as models_module
from kogia.serve.access import Keys
from kogia.serve.config import ServeConfig, num_bytes
from kogia.serve.errors import ApiError
from kogia.serve.exchange import Exchange
from kogia.serve.loading import all_settings, load_model, names_of, read_models
from kogia.serve.models import Models
from kogia.serve.served import Phase

ENGINE = {"num_blocks": 64, "max_sequences": 8}
SHORT = {"max_tokens": 3, "ignore_eos": True}


def models_file(directory: Path, model: Path, *names: str, more: str = "") -> str:
    file = directory / "models.toml"
    file.write_text("".join(f'["{name}"]\npath = "{model}"\n{more}\n' for name in names))
    return str(file)


def limit_for(model: Path, count: float) -> str:
    """Bytes that so many of these models take."""
    (entry,) = read_models(settings(model))
    return str(int(entry.need.total * count))


def settings(model: Path, **more) -> ServeConfig:
    return ServeConfig(path=str(model), device="cpu", engine=EngineConfig(**ENGINE), **more)


def say(server, name: str, **more):
    return post(server, "/v1/chat/completions", {"model": name, "messages": HELLO, **SHORT, **more})


def states(server) -> dict[str, str]:
    return {each["id"]: each["state"] for each in httpx.get(f"{server.url}/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def three(model, tmp_path_factory):
    """A server with room for two of its three models."""
    file = tmp_path_factory.mktemp("several") / "models.toml"
    file.write_text(f'[b]\npath = "{model}"\n["org/c"]\npath = "{model}"\nname = ["also"]\n')
    with serving(
        model, engine=ENGINE, name=("a",), models_file=str(file), memory_limit=limit_for(model, 2.5)
    ) as server:
        yield server


def test_requests_choose_by_name_and_the_model_that_was_named_longest_ago_makes_room(three):
    assert states(three) == {"a": "loaded", "b": "unloaded", "org/c": "unloaded", "also": "unloaded"}
    for name, left in (("b", {"a", "b"}), ("a", {"a", "b"}), ("also", {"a", "org/c"}), ("b", {"b", "org/c"})):
        answer = say(three, name)
        assert answer.status_code == 200 and answer.json()["model"] == ("org/c" if name == "also" else name)
        found = states(three)
        assert found.pop("also") == found["org/c"]
        assert {each for each, state in found.items() if state == "loaded"} == left
    assert refusal(say(three, "d"), 404)["code"] == "model_not_found"
    assert refusal(post(three, "/v1/chat/completions", {"messages": HELLO}), 404)["param"] == "model"
    assert httpx.get(f"{three.url}/v1/models/org/c").json()["state"] == "loaded"


def test_counts_are_per_model_and_go_on_when_it_is_loaded_again(three):
    def generated() -> dict[str, float]:
        samples = scrape(three)["vllm:generation_tokens_total"]
        return {each.labels["model_name"]: each.value for each in samples}

    before = generated()
    for name in ("a", "b", "org/c", "a"):
        assert say(three, name).status_code == 200
    gained = {name: count - before[name] for name, count in generated().items()}
    assert gained == {"a": 6, "b": 3, "org/c": 3}
    found = scrape(three)
    loaded = {each.labels["model_name"]: each.value for each in found["kogia_model_loaded"]}
    assert loaded == {"a": 1, "b": 0, "org/c": 1}
    for name, is_loaded in loaded.items():
        assert (value(found, "kogia_model_bytes", model_name=name) > 0) == bool(is_loaded)
        assert (value(found, "kogia_cache_bytes", model_name=name) > 0) == bool(is_loaded)
        assert value(found, "kogia_model_loads_total", model_name=name) >= 1


def test_a_model_that_answers_is_never_unloaded_and_who_finds_no_room_is_told_to_come_again(model, tmp_path):
    file = models_file(tmp_path, model, "b")
    more = {"memory_limit": limit_for(model, 1.5), "load_wait_seconds": 0.1}
    with serving(model, engine=ENGINE, name=("a",), models_file=file, **more) as server:
        stream = events(server, "/v1/chat/completions", {"model": "a", **LONG})
        next(stream)
        refused = say(server, "b")
        assert "b is not loaded yet" in refusal(refused, 503)["message"] and refused.headers["retry-after"]
        assert states(server) == {"a": "loaded", "b": "unloaded"}
        waiting = threading.Thread(target=lambda: got.append(say(server, "b")))
        got: list[httpx.Response] = []
        server.state.models._wait_seconds = 30
        waiting.start()
        assert until(lambda: server.state.models["b"].num_users)
        stream.close()  # a is free now, and goes
        waiting.join(60)
        assert got[0].status_code == 200 and states(server) == {"a": "unloaded", "b": "loaded"}


LONG = {"messages": HELLO, "stream": True, "max_tokens": 1000, "ignore_eos": True}


def test_all_who_ask_for_a_model_wait_for_one_loading(model, tmp_path):
    with serving(model, engine=ENGINE, models_file=models_file(tmp_path, model, "b")) as server:
        load, began, go = server.state.models._load, [], threading.Event()
        server.state.models._load = lambda config: (began.append(config), go.wait(60), load(config))[2]
        answers: list[int] = []
        asking = [threading.Thread(target=lambda: answers.append(say(server, "b").status_code)) for _ in range(4)]
        for each in asking:
            each.start()
        assert until(lambda: began and server.state.models["b"].num_users == 4)
        assert states(server)["b"] == "loading" and say(server, "tiny").status_code == 200  # others answer meanwhile
        go.set()
        for each in asking:
            each.join(60)
        assert answers == [200] * 4 and len(began) == 1


def test_a_loading_that_fails_ends_nothing_else_and_says_why_in_the_log_alone(model, tmp_path, capfd, monkeypatch):
    with serving(model, engine=ENGINE, models_file=models_file(tmp_path, model, "b")) as server:
        load = server.state.models._load

        def fail(config):
            raise ValueError(f"{config.path}: half of it is missing")

        server.state.models._load = fail
        refused = say(server, "b")
        assert refusal(refused, 503)["message"] == "b could not be loaded; the server's log says why; try again later"
        assert refused.headers["retry-after"] == "30"
        assert f"b could not be loaded: {model}: half of it is missing" in capfd.readouterr().err
        assert states(server) == {"tiny": "loaded", "b": "failed"} and say(server, "tiny").status_code == 200
        server.state.models._load = load
        refusal(say(server, "b"), 503)  # too soon
        server.state.models["b"].retry_at = 0.0
        assert say(server, "b").status_code == 200 and states(server)["b"] == "loaded"


def test_what_is_unloaded_gives_its_memory_back(model):
    async def rounds() -> None:
        models = Models(settings(model))
        with models:
            await models.open()
            (entry,) = models
            for _ in range(2):
                exchange = Exchange("x", "POST", 0.0)
                served = await models.use(None, exchange)
                weights, engine = weakref.ref(served.llm.model), weakref.ref(served.engine)
                del served
                with pytest.raises(ApiError, match="drain it first"):
                    await models.unload(entry)
                models.leave(exchange)
                await models.unload(entry)
                gc.collect()
                assert weights() is None and engine() is None and entry.phase is Phase.UNLOADED
                assert models.num_bytes == 0

    asyncio.run(rounds())


@pytest.mark.parametrize("quantize", ["none", "fp8", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_model_takes_is_known_before_it_is_loaded(tmp_path, quantize, tied):
    config = replace(CONFIG, dim=128, ffn_dim=256, tie_embeddings=tied)
    config = replace(
        config, moe=replace(config.moe, expert_dim=128), attention=replace(config.attention, kv_lora_rank=128)
    )
    directory = save_model(build_model(config), tmp_path / "model")
    stored, quantize = read_stored(directory), None if quantize == "none" else quantize
    model = load_weights(directory, quantize=quantize)
    model.absorb()
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    copies = [module._copy for module in model.modules() if getattr(module, "_copy", None) is not None]
    assert loaded_bytes(stored, quantize=quantize) == sum(storages.values()) + sum(each.nbytes for each in copies)
    assert bool(copies) == (quantize is not None)


def test_caches_are_as_large_as_was_said_before(model, tmp_path):
    file, (one,) = models_file(tmp_path, model, "b"), read_models(settings(model))
    for limit in ("40MB", str(3 * one.need.weights)):  # room for both, and by turns
        both = read_models(ServeConfig(path=str(model), device="cpu", models_file=file, memory_limit=limit))
        assert (sum(entry.need.total for entry in both) <= num_bytes(limit)) == (limit == "40MB")
        for entry in both:
            assert entry.need.total <= num_bytes(limit)
            served = load_model(entry.settings)
            assert served.engine.runner.cache.rows.nbytes == entry.need.cache
            assert served.engine.config.num_draft_tokens == 1  # what the model does by itself is not lost on the way


@pytest.mark.parametrize(
    "table, more, says",
    [
        ("at_start = true", {"memory_limit": "12MB"}, "what is loaded at the start takes tiny"),
        ("", {"memory_limit": "1MB"}, r"tiny can never be loaded: weights .* \+ cache .* = .* memory_limit"),
        ("", {"memory_limit": "0.1MB"}, r"tiny can never|one block of 16 tokens"),
        ("at_start = 1", {}, "at_start must be true or false"),
        ("port = 3", {}, "has port; known are path"),
        ("max_tokens = 0", {}, "max_tokens = 0: must be at least 1"),
        ("engine.max_sequence = 3", {}, "did you mean 'max_sequences'"),
        ('name = ["tiny"]', {}, "two models are called 'tiny'"),
        ('dtype = "fp9"', {}, "dtype"),
    ],
)
def test_models_that_cannot_be_are_refused_before_anything_is_loaded(model, tmp_path, table, more, says):
    file = models_file(tmp_path, model, "b", more=table)
    engine = EngineConfig(num_blocks=2048)
    with pytest.raises(ValueError, match=says):
        read_models(ServeConfig(path=str(model), device="cpu", models_file=file, engine=engine, **more))


def test_a_file_of_models_that_is_none_is_an_error_of_the_user(model, tmp_path, capfd):
    (tmp_path / "models.toml").write_text("[b")
    words = ["serve", str(model), "--port", "0", "--models-file", str(tmp_path / "models.toml")]
    assert cli.main(words) == 2 and "is no TOML" in capfd.readouterr().err
    (tmp_path / "models.toml").write_text('b = "path"')
    assert cli.main(words) == 2 and 'must be a table with path = "..."' in capfd.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--memory-limit", "much"])
    assert "must be a size above 0" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["models-file", "api-key-file", "admin-key-file"])
def test_a_file_of_the_operator_that_is_not_there_is_named_with_its_option(model, tmp_path, capfd, option):
    for place, says in ((tmp_path / "nothing", "no such file"), (tmp_path, "cannot be read")):
        assert cli.main(["serve", str(model), "--port", "0", f"--{option}", str(place)]) == 2
        assert f"{place}: {says}" in (told := capfd.readouterr().err) and f"; --{option} names" in told


def test_operators_files_may_be_links_as_those_of_kubernetes_are(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "data" / "keys").write_text("alice: " + "k" * 20)
    (tmp_path / "own" / "keys").symlink_to(tmp_path / "data" / "keys")
    assert [caller.name for caller in Keys.read(tmp_path / "own" / "keys").callers] == ["alice"]


def test_a_table_says_what_is_not_as_the_command_says(model, tmp_path):
    text = f'path = "{model}"\ntemperature = 0.1\nname = ["again"]\n[b.engine]\nnum_blocks = 7\n'
    (tmp_path / "models.toml").write_text(f"[b]\n{text}")
    config = replace(settings(model, models_file=str(tmp_path / "models.toml")), top_p=0.5, max_tokens=9)
    (_, _), (own, at_start) = all_settings(config)
    assert (own.name, own.temperature, own.top_p, own.max_tokens, at_start) == (("b", "again"), 0.1, 0.5, 9, False)
    assert (own.engine.num_blocks, own.engine.max_sequences) == (7, 8)


@pytest.mark.parametrize(
    "text, nbytes",
    [("40GB", 40 * 10**9), ("1.5 GiB", 3 * 2**29), ("2G", 2**31), ("1000", 1000), ("7B", 7), ("512MiB", 2**29)],
)
def test_sizes_are_read_as_people_write_them(text, nbytes):
    assert num_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1GB", "many", "4 GiBs", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="must be a size above 0"):
        num_bytes(text)


def test_more_requests_than_may_wait_are_told_to_come_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(models_module, "MOST_WAITING", 1)
    with serving(model, engine=ENGINE, models_file=models_file(tmp_path, model, "b")) as server:
        load, go = server.state.models._load, threading.Event()
        server.state.models._load = lambda config: (go.wait(60), load(config))[1]
        answers: list[int] = []
        first = threading.Thread(target=lambda: answers.append(say(server, "b").status_code))
        first.start()
        assert until(lambda: states(server)["b"] == "loading")
        refusal(say(server, "b"), 503)
        go.set()
        first.join(60)
        assert answers == [200]


def test_a_model_is_called_by_the_last_part_of_its_path_and_one_of_the_hub_by_its_whole_name_too(model, server):
    assert names_of(ServeConfig(path=str(model))) == (model.name,)
    assert names_of(ServeConfig(path="org/some-model")) == ("some-model", "org/some-model")
    assert names_of(ServeConfig(path="org/some-model", name=("mine", "mine"))) == ("mine",)
    error = refusal(post(server, "/v1/chat/completions", {"model": "gpt", "messages": HELLO}), 404)
    assert error["message"] == f"model = 'gpt': must be one of {model.name}, or left out"
