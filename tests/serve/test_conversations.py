"""Conversations that the server keeps: apart for each key, whole or not at all, bounded, under no client's names."""

import errno
import json
import threading
from pathlib import Path

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve.asks import refusal
from serve.server import serving

from kogia.cli import main
from kogia.serve import conversations
from kogia.serve.conversations import ConversationStore
from kogia.serve.errors import ApiError

IDS = [f"{number:032x}" for number in range(9)]
ALICE, BOB = ({"Authorization": f"Bearer sk-{name}-0123456789"} for name in ("alice", "bob"))


def conversation(id, text="hello", updated=1.0):
    return {"id": id, "title": text[:60], "updated": updated, "nodes": {"a": {"id": "a", "content": text}}}


@pytest.fixture
def store(tmp_path):
    return ConversationStore(tmp_path / "kept", 10_000)


@pytest.fixture(scope="module")
def keeping(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    keys = folder / "keys"
    keys.write_text("alice: sk-alice-0123456789\nbob: sk-bob-0123456789\n")
    keys.chmod(0o600)
    with serving(model, api_key_file=str(keys), store=str(folder / "kept")) as server:
        yield server


def put(server, id, text, revision=0, headers=ALICE, **body):
    body = {"revision": revision, "conversation": conversation(id, text), **body}
    return httpx.post(f"{server.url}/page/conversations/{id}", json=body, headers=headers)


def get(server, path="", headers=ALICE):
    return httpx.get(f"{server.url}/page/conversations{path}", headers=headers)


def test_what_is_written_is_listed_read_exported_and_deleted(keeping):
    assert httpx.get(keeping.url + "/page/models", headers=ALICE).json()["keeps"] is True
    assert put(keeping, IDS[0], "első\U0001f600").json() == {"revision": 1}
    assert put(keeping, IDS[1], "second").json() == {"revision": 1}
    listed = get(keeping).json()["conversations"]
    assert {(each["id"], each["title"], each["revision"]) for each in listed} == {
        (IDS[0], "első\U0001f600", 1), (IDS[1], "second", 1),
    }  # fmt: skip
    assert get(keeping, f"/{IDS[0]}").json() == {"revision": 1, "conversation": conversation(IDS[0], "első\U0001f600")}
    exported = get(keeping, ".json")
    assert exported.headers["content-disposition"].startswith("attachment")
    file = exported.json()
    assert (file["format"], file["version"], len(file["conversations"])) == ("kogia-conversations", 1, 2)
    for id in IDS[:2]:
        assert httpx.delete(f"{keeping.url}/page/conversations/{id}", headers=ALICE).json()["deleted"]
    assert get(keeping).json() == {"conversations": []} and get(keeping, ".json").json()["conversations"] == []
    refusal(get(keeping, f"/{IDS[0]}"), 404)
    refusal(httpx.delete(f"{keeping.url}/page/conversations/{IDS[0]}", headers=ALICE), 404)


def test_a_key_sees_its_own_and_no_others(keeping):
    put(keeping, IDS[2], "secret of alice")
    assert get(keeping, headers=BOB).json() == {"conversations": []}
    refusal(get(keeping, f"/{IDS[2]}", BOB), 404)
    refusal(httpx.delete(f"{keeping.url}/page/conversations/{IDS[2]}", headers=BOB), 404)
    assert put(keeping, IDS[2], "bob's", headers=BOB).json() == {"revision": 1}
    assert get(keeping, f"/{IDS[2]}").json()["conversation"]["title"] == "secret of alice"
    for path in ("", ".json", f"/{IDS[2]}"):
        refusal(get(keeping, path, {}), 401)


def test_of_two_writers_of_one_revision_one_hears_of_the_other(keeping):
    answers = []
    put(keeping, IDS[3], "first")
    writers = [
        threading.Thread(target=lambda n=n: answers.append(put(keeping, IDS[3], f"{n}", revision=1))) for n in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    lost = next(answer for answer in answers if answer.status_code == 409)
    assert refusal(lost, 409)["code"] == "revision_conflict"
    assert refusal(put(keeping, IDS[4], "x", revision=5), 409)["message"].startswith("revision = 5: 0 stands here")


@pytest.mark.parametrize("id", [
    "..", "../../etc/passwd", "%2e%2e%2fpasswd", "..%5c..%5cx", "/etc/passwd", "a" * 31, "A" * 32, "a" * 32 + "\n",
    "%00" * 32, "a" * 32 + ".json", "g" * 32, "x" * 5000,
])  # fmt: skip
def test_no_path_comes_from_a_request(keeping, id):
    before = sorted(Path(keeping.state.config.store).parent.rglob("*"))
    for method in ("GET", "POST", "DELETE"):
        body = {"revision": 0, "conversation": conversation(id)} if method == "POST" else None
        url = f"{keeping.url}/page/conversations/{id if '%' in id else id.replace(chr(10), '%0A')}"
        response = httpx.request(method, url, json=body, headers=ALICE)
        assert 400 <= response.status_code < 500, (method, response.text)
    assert sorted(Path(keeping.state.config.store).parent.rglob("*")) == before


@given(st.text(max_size=40))
@settings(max_examples=50)
def test_an_id_that_is_none_is_refused_before_the_disk(id):
    kept = ConversationStore.__new__(ConversationStore)
    with pytest.raises(ApiError, match="32 hexadecimal digits"):
        kept._path("anybody", id)


@pytest.mark.parametrize("body", [
    {"conversation": []}, {"conversation": {}}, {"revision": -1}, {"revision": "0"}, {"revision": None},
    {"conversation": conversation(IDS[6])}, {"conversation": {**conversation(IDS[5]), "title": 5}},
    {"conversation": {**conversation(IDS[5]), "updated": True}},
    {"conversation": {**conversation(IDS[5]), "nodes": []}},
])  # fmt: skip
def test_what_is_no_conversation_is_refused(keeping, body):
    refusal(put(keeping, IDS[5], "x", **body))
    assert all(each["id"] != IDS[5] for each in get(keeping).json()["conversations"])


def test_a_server_without_a_store_says_how_to_have_one(server):
    assert httpx.get(server.url + "/page/models").json()["keeps"] is False
    assert "kogia serve --store DIR" in refusal(get(server, headers={}), 404)["message"]


def test_bytes_and_number_are_bounded_and_what_stood_stands(store, monkeypatch):
    store.write("me", IDS[0], 0, conversation(IDS[0], "x" * 4000))
    store.write("me", IDS[1], 0, conversation(IDS[1], "x" * 4000))
    for id, revision in ((IDS[2], 0), (IDS[1], 1)):
        with pytest.raises(ApiError, match="delete some") as caught:
            store.write("me", id, revision, conversation(id, "x" * 9000))
        assert caught.value.status == 507
    assert len(store.read("me", IDS[1])["conversation"]["nodes"]["a"]["content"]) == 4000
    store.write("other", IDS[2], 0, conversation(IDS[2], "x" * 4000))
    store.write("me", IDS[1], 1, conversation(IDS[1], "shorter"))
    monkeypatch.setattr(conversations, "MOST_CONVERSATIONS", 2)
    with pytest.raises(ApiError, match="2 conversations are kept here, the most"):
        store.write("me", IDS[3], 0, conversation(IDS[3]))
    store.write("me", IDS[1], 2, conversation(IDS[1], "one that is there may still be written"))


def test_on_a_full_disk_what_stood_stands_and_the_client_hears_why(store, monkeypatch, capsys):
    store.write("me", IDS[0], 0, conversation(IDS[0], "old"))

    def full(self, *args, **kwargs):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ApiError, match="disk is full") as caught:
        store.write("me", IDS[0], 1, conversation(IDS[0], "new"))
    monkeypatch.undo()
    assert caught.value.status == 507 and "was not kept" in capsys.readouterr().err
    assert store.read("me", IDS[0]) == {"revision": 1, "conversation": conversation(IDS[0], "old")}
    assert [each["id"] for each in store.heads("me")] == [IDS[0]], "and nothing half written is left"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\n{}", b"{}\n{}", b'{"id": 1}\n', b"[" * 5000, b"null\n{}"])
def test_a_damaged_file_is_passed_over_and_may_be_replaced(store, content, capsys):
    store.write("me", IDS[0], 0, conversation(IDS[0]))
    store.write("me", IDS[1], 0, conversation(IDS[1]))
    store._path("me", IDS[0]).write_bytes(content)
    assert [each["id"] for each in store.heads("me")] == [IDS[1]]
    assert f"{IDS[0]}.json: is no conversation" in capsys.readouterr().err
    with pytest.raises(ApiError, match="no such conversation"):
        store.read("me", IDS[0])
    assert len(json.loads("".join(store.export("me")))["conversations"]) == 1
    assert store.write("me", IDS[0], 0, conversation(IDS[0])) == 1


def test_a_place_that_will_not_do_ends_the_start(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["serve", str(model), "--port", "0", "--store", str(tmp_path / "file")]) == 2
    assert "is a file, where a directory is needed" in capsys.readouterr().err
