"""`kogia bench --url` drives our own server."""

import json

from serve.server import serving

from kogia.cli import main


def test_a_server_with_keys_is_measured_as_it_counts(model, tmp_path, capsys):
    keys, out = tmp_path / "keys", tmp_path / "load.json"
    keys.write_text("alice: sk-0123456789abcdef\n")
    with serving(model, api_key_file=str(keys)) as server:
        words = ["bench", "--url", server.url, "--requests", "12", "--max-tokens", "8", "--out", str(out)]
        assert main(words) == 2
        assert "GET /v1/models says 401: the key is missing or wrong" in capsys.readouterr().err
        words += ["--api-key-file", str(keys), "--prefix-tokens", "64"]
        for more in (["--clients", "4"], ["--rate", "500", "--api", "completions"]):
            assert main([*words, *more]) == 0
            found = json.loads(out.read_text())
            assert (found["completed"], found["failed"], found["total_output_tokens"]) == (12, 0, 96)
            assert 110 * 12 < found["total_input_tokens"] < 146 * 12
            assert 0 < found["median_ttft_ms"] < found["median_e2el_ms"] and found["model"] == "tiny"
        assert not server.state.running
