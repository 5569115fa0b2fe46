"""`/v1/admin`: what operators do to a running server, and who may not."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import pytest
from inference.tiny import CONFIG
from serve.asks import HELLO, events, post, refusal
from serve.server import serving

from kogia import cli
from kogia.checkpoint.hf import save_model
from kogia.model.transformer import build_model
from kogia.serve.access import Keys
from kogia.serve.state import Status
from kogia.text.tokenizer import Tokenizer, train_bpe

USER, ADMIN = "a-key-of-a-user-1234", "the-key-of-an-operator"
ENGINE = {"num_blocks": 300, "max_sequences": 8}
SHORT = {"messages": HELLO, "max_tokens": 3, "ignore_eos": True}
LONG = {"messages": HELLO, "stream": True, "max_tokens": 4000, "ignore_eos": True}
ROUTES = ("load", "unload", "drain", "undrain", "reload", "flush", "cancel")


@pytest.fixture(scope="module")
def others(model, tmp_path_factory) -> dict[str, Path]:
    """Models beside the server's own: the same with other weights, and what cannot take its place."""
    place, tokenizer = tmp_path_factory.mktemp("others"), Tokenizer.load(model)
    config = replace(CONFIG, max_position=4096, vocab_size=tokenizer.vocab_size)
    other = train_bpe(["none of this is the answer " * 20], 300)
    other.backend.add_special_tokens([f"<{number}>" for number in range(tokenizer.vocab_size - other.vocab_size)])
    made = {
        "new": (config, tokenizer),
        "wider": (replace(config, ffn_dim=96), tokenizer),
        "stranger": (config, other),
        "broken": (config, tokenizer),
    }
    paths = {name: save_model(build_model(own, seed=9), place / name, by) for name, (own, by) in made.items()}
    weights = paths["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return paths


@pytest.fixture(scope="module")
def files(others, tmp_path_factory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("files")
    (place / "models.toml").write_text("".join(f'[{name}]\npath = "{path}"\n' for name, path in others.items()))
    for name, key in (("keys", USER), ("admin", ADMIN)):
        (place / name).write_text(f"{name}: {key}\n")
        (place / name).chmod(0o600)
    return {"models_file": str(place / "models.toml")} | {
        "api_key_file": str(place / "keys"),
        "admin_key_file": str(place / "admin"),
    }


@pytest.fixture
def server(model, files, others, monkeypatch):
    broken = others["broken"] / "model.safetensors"
    whole = (others["new"] / "model.safetensors").read_bytes()
    cut = broken.read_bytes()
    broken.write_bytes(whole)  # damaged only once it has been looked at
    with serving(model, engine=ENGINE, name=("a",), **files) as running:
        broken.write_bytes(cut)
        yield running


def key(value: str) -> dict[str, str]:
    return {"authorization": f"Bearer {value}"}


def manage(server, route: str, **body) -> httpx.Response:
    return post(server, f"/v1/admin/{route}", body, headers=key(ADMIN))


def told(server) -> dict:
    return httpx.get(f"{server.url}/v1/admin/models", headers=key(ADMIN)).json()


def of(server, name: str) -> dict:
    return next(each for each in told(server)["models"] if name in each["names"])


def say(server, model: str = "a", **more) -> httpx.Response:
    return post(server, "/v1/chat/completions", {"model": model, **SHORT, **more}, headers=key(USER))


def streaming(server, model: str = "a"):
    stream = events(server, "/v1/chat/completions", {"model": model, **LONG}, headers=key(USER))
    next(stream)
    return stream


def test_only_a_key_of_an_operator_opens_it_and_it_opens_nothing_else(server):
    for method, route in [("GET", "models"), *(("POST", route) for route in ROUTES)]:
        url = f"{server.url}/v1/admin/{route}"
        body = None if method == "GET" else {"model": "a"}
        refusal(httpx.request(method, url, json=body), 401)
        refusal(httpx.request(method, url, json=body, headers=key("x" * 20)), 401)
        assert "is a user's" in refusal(httpx.request(method, url, json=body, headers=key(USER)), 403)["message"]
    refusal(post(server, "/v1/chat/completions", SHORT, headers=key(ADMIN)), 401)
    assert of(server, "a")["state"] == "loaded" and say(server).status_code == 200


def test_without_a_file_of_keys_there_is_nothing(model):
    with serving(model, engine=ENGINE) as server:
        for route in ("models", *ROUTES):
            assert httpx.get(f"{server.url}/v1/admin/{route}").status_code == 404
            assert post(server, f"/v1/admin/{route}", {"model": "tiny"}, headers=key(ADMIN)).status_code in (404, 405)


def test_an_admin_key_that_is_a_users_is_an_error_of_the_user(model, files, tmp_path, capfd):
    (tmp_path / "admin").write_text(f"me: sha256:{Keys.read(files['api_key_file']).callers[0].digest}")
    words = ["serve", str(model), "--port", "0", "--api-key-file", files["api_key_file"], "--admin-key-file"]
    assert cli.main([*words, str(tmp_path / "admin")]) == 2
    assert "the admin key me is the key of keys, too" in capfd.readouterr().err
    assert cli.main([*words, str(tmp_path / "nothing")]) == 2
    assert "--admin-key-file names one" in capfd.readouterr().err


def test_models_are_loaded_and_unloaded_by_name_and_a_path_is_refused(server):
    loaded = manage(server, "load", model="new").json()
    assert (loaded["state"], loaded["names"]) == ("loaded", ["new"]) and loaded["memory"] > 0
    assert manage(server, "load", model="new").json()["state"] == "loaded"
    assert manage(server, "unload", model="new").json() | {"memory": 0} == of(server, "new")
    assert of(server, "new")["state"] == "unloaded"
    assert "path" in refusal(manage(server, "load", model="new", path="/etc"))["message"]
    assert refusal(manage(server, "load", model="/etc/model"), 404)["code"] == "model_not_found"
    assert refusal(manage(server, "load"))["param"] == "model"


def test_a_load_that_fails_midway_says_why_and_the_server_goes_on(server):
    assert "broken could not be loaded" in refusal(manage(server, "load", model="broken"), 500)["message"]
    assert of(server, "broken")["state"] == "failed" and "broken" in of(server, "broken")["error"]
    assert say(server).status_code == 200
    assert manage(server, "load", model="new").status_code == 200


def test_two_loads_at_once_are_one_and_a_drain_while_it_loads_holds_when_it_has(server):
    load, began, go = server.state.models._load, [], threading.Event()
    server.state.models._load = lambda config: (began.append(config), go.wait(60), load(config))[2]
    answers: list[httpx.Response] = []
    asks = (lambda: manage(server, "load", model="new"),) * 2 + (lambda: say(server, "new"),)
    threads = [threading.Thread(target=lambda ask=ask: answers.append(ask())) for ask in asks]
    for thread in threads:
        thread.start()
    while of(server, "new")["state"] != "loading" or not of(server, "new")["users"]:
        time.sleep(0.01)
    assert manage(server, "drain", model="new").json()["is_drained"]
    go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503] and len(began) == 1
    assert "takes no requests now" in refusal(say(server, "new"), 503)["message"]
    manage(server, "undrain", model="new")
    assert say(server, "new").status_code == 200


def test_a_model_that_is_drained_ends_what_it_has_and_can_then_be_unloaded(server):
    stream = streaming(server)
    manage(server, "drain", model="a")
    refused = say(server)
    assert refusal(refused, 503) and refused.headers["retry-after"]
    assert "answers 1 requests; drain it first" in refusal(manage(server, "unload", model="a"), 409)["message"]
    (running,) = of(server, "a")["running"]
    assert (running["key"], running["tokens"] > 0) == ("keys", True)
    stream.close()
    while of(server, "a")["users"]:
        time.sleep(0.01)
    assert manage(server, "unload", model="a").json()["state"] == "unloaded"
    assert manage(server, "undrain", model="a").json()["is_drained"] is False
    assert say(server).status_code == 200  # loaded again


def test_a_server_that_is_drained_takes_no_requests_until_it_does_again(server):
    stream = streaming(server)
    assert manage(server, "drain").json()["status"] == "draining"
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert "draining" in refusal(say(server), 503)["message"]
    assert next(stream)["choices"]  # goes on
    assert manage(server, "undrain").json()["status"] == "ready"
    assert say(server).status_code == 200
    server.state.is_ending = True
    assert "told to end" in refusal(manage(server, "undrain"), 409)["message"]
    assert server.state.status is Status.DRAINING
    stream.close()


@pytest.mark.parametrize("by", ["id", "request_id"])
def test_a_request_is_ended_by_either_of_its_ids_and_its_client_hears_why(server, by):
    stream = streaming(server)
    (running,) = of(server, "a")["running"]
    assert manage(server, "cancel", id=running[by]).json()["ended"] == [running["id"]]
    assert "the operator has ended this request" in list(stream)[-1]["error"]["message"]
    assert "no request of that id" in refusal(manage(server, "cancel", id=running[by]), 404)["message"]
    assert server.state.models["a"].served.engine.num_unfinished == 0


def greedy(server, model: str = "a") -> list[int]:
    answer = say(server, model, temperature=0, max_tokens=12, return_token_ids=True).json()
    return answer["choices"][0]["token_ids"]


def test_new_weights_are_those_of_the_other_model_and_running_requests_go_on_with_them(server):
    before, theirs, stream = greedy(server), greedy(server, "new"), streaming(server)
    reloaded = manage(server, "reload", model="a", **{"from": "new"}).json()
    assert reloaded["weights_version"] == 1 and reloaded["path"] == of(server, "new")["path"]
    assert greedy(server) == theirs != before
    (before,) = of(server, "a")["running"]
    assert [next(stream)["choices"][0]["finish_reason"] for _ in range(3)] == [None] * 3
    while of(server, "a")["running"][0]["tokens"] <= before["tokens"]:
        next(stream)
    stream.close()
    while of(server, "a")["users"]:
        time.sleep(0.01)
    manage(server, "unload", model="a")
    assert greedy(server) == theirs  # and when it is loaded again


@pytest.mark.parametrize("name, says", [("wider", "ffn_dim differ"), ("stranger", "another tokenizer"), ("broken", "")])
def test_weights_that_do_not_fit_or_cannot_be_read_are_refused_and_the_old_ones_stay(server, name, says):
    before = greedy(server)
    refused = refusal(manage(server, "reload", model="a", **{"from": name}))
    assert refused["message"].startswith("a keeps its weights: ") and says in refused["message"]
    assert greedy(server) == before and of(server, "a")["weights_version"] == 0
    assert "not loaded" in refusal(manage(server, "reload", model="new"), 409)["message"]
    assert refusal(manage(server, "reload", model="a", **{"from": "/etc"}), 404)


def test_new_weights_that_never_have_room_beside_the_old_ones_are_refused_at_once(server, monkeypatch):
    monkeypatch.setattr(server.state.models, "limit", of(server, "a")["memory"] + 1000)
    began = time.monotonic()
    refused = refusal(manage(server, "reload", model="a"), 409)
    assert refused["message"].startswith("a keeps its weights: it takes ") and "unload it" in refused["message"]
    assert time.monotonic() - began < 40 and of(server, "a")["weights_version"] == 0


def test_a_flush_forgets_prefixes_and_nothing_else(server):
    body = {"messages": [{"role": "user", "content": "what is the answer? " * 20}]}

    def cached() -> int:
        return say(server, **body).json()["usage"]["prompt_cache_hit_tokens"]

    cached()
    stream, num_cached = streaming(server), cached()
    assert manage(server, "flush", model="a").json()["blocks"]["a"] >= num_cached // 16 > 0
    before = server.engine.loop.num_steps
    server.engine.forget_prefixes()
    assert server.engine.loop.num_steps - before < 20  # it waits for one step, though others would follow at once
    assert cached() == 0 and cached() == num_cached
    assert manage(server, "flush").json()["blocks"].keys() == {"a"}
    assert next(stream)["choices"]
    stream.close()
    while of(server, "a")["users"] or server.engine.num_unfinished:
        time.sleep(0.01)
    pool = server.engine.scheduler.pool
    assert pool.num_free == pool.num_blocks


def test_a_path_that_was_cut_off_while_it_ran_keeps_its_blocks_until_it_ends():
    from kogia.engine.blocks import BlockPool

    pool = BlockPool(3)
    own = pool.allocate(2)
    pool.register(own[0], b"a")
    pool.register(own[1], b"b")
    pool.release(own[1:])
    assert pool.forget_all() == 2 and pool.acquire(b"a") is None and pool.acquire(b"b") is None
    assert pool.num_free == 2 and own[0] not in pool.allocate(2)
    pool.release(own[:1])
    assert pool.num_free == 1 and pool.allocate(1) == own[:1]
