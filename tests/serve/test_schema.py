"""The OpenAPI document against the server: schemathesis makes requests of it, right and wrong, and reads the answers.

SCHEMA_SECONDS=600 python -m pytest --timeout 0 tests/serve/test_schema.py      # a longer run, by hand
"""

import os
import subprocess
import sys

import httpx2 as httpx
import pytest
from serve.server import serving

pytest.importorskip("schemathesis", reason="the fuzzer of OpenAPI documents is not installed")

SECONDS = int(os.environ.get("SCHEMA_SECONDS", "15"))
KEY = "alice-0123456789abcdef"
EXCLUDED = {
    # A schema has no words for rules between fields and for those of the model (a result needs a call before it, a
    # prompt or messages, but not both; a token beyond the vocabulary), and to it 5.0 is a whole number.
    "positive_data_acceptance": "what is refused although its document takes it",
}


@pytest.fixture(scope="module")
def locked(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"alice: {KEY}\n")
    file.chmod(0o600)
    with serving(model, api_key_file=str(file), max_tokens=8) as running:
        yield running


REFUSALS = (400, 401, 403, 404, 405, 406, 409, 413, 414, 415, 422, 429)
"""Answers to what the document does not allow: too much is 413, too long an address 414."""


def fuzz(url, seconds, directory):
    directory.joinpath("schemathesis.toml").write_text(
        f"[checks.negative_data_rejection]\nexpected-statuses = {list(REFUSALS)}\n"
    )
    words = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
    words += ["--header", f"Authorization: Bearer {KEY}", "--exclude-checks", ",".join(EXCLUDED)]
    words += ["--phases", "coverage,fuzzing", "--max-time", str(seconds), "--max-examples", str(max(3, SECONDS // 5))]
    words += ["--no-color", "--generation-database", "none"]
    words += ["--request-timeout", "60"]  # seconds: of a machine with much to do, too
    words += ["--seed", "1"] if "SCHEMA_SECONDS" not in os.environ else []
    return subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)


def test_no_request_of_the_document_or_against_it_gets_an_answer_that_it_does_not_have(locked, tmp_path):
    for seconds in (SECONDS, 10 * SECONDS):  # a machine with much to do has asked nothing when the first have passed
        ran = fuzz(locked.url, seconds, tmp_path)
        if ran.returncode or " passed" in ran.stdout:
            break
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout, ran.stdout[-2000:]
    assert locked.engine.num_unfinished == 0 and not locked.state.running


def test_the_document_names_every_status_and_asks_for_keys_only_where_there_are_any(locked, server):
    with_keys = httpx.get(f"{locked.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    without = httpx.get(f"{server.url}/openapi.json").json()
    assert with_keys["paths"].keys() == without["paths"].keys() and "securitySchemes" not in without["components"]
    for path, methods in with_keys["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"] and {"200", "400", "500"} <= operation["responses"].keys()
            assert ("security" in operation) == (path not in ("/health", "/ready"))
    assert not any("security" in operation for each in without["paths"].values() for operation in each.values())
