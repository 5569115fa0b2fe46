"""What is in `deploy/` says nothing that the program does not know."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx2 as httpx
import pytest

from kogia.config import parse_args
from kogia.serve.config import ServeConfig

DEPLOY = Path(__file__).parents[2] / "deploy"


def unit() -> str:
    return (DEPLOY / "kogia.service").read_text()


def test_the_unit_starts_the_server_with_options_that_exist_and_waits_for_its_drain():
    words = shlex.split(re.search(r"^ExecStart=(.*)$", unit(), re.M)[1])
    assert words[1] == "serve"
    config = parse_args(ServeConfig, words[2:], prog="kogia serve", description="")
    assert config.host == "0.0.0.0" and config.api_key_file == "%d/keys"
    assert config.drain_seconds < int(re.search(r"^TimeoutStopSec=(\d+)$", unit(), re.M)[1])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    copy = tmp_path / "kogia.service"
    copy.write_text(unit().replace("/opt/kogia/.venv/bin/kogia", shutil.which("true")))
    found = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=30)
    assert "kogia.service" not in found.stderr, found.stderr


def test_the_image_starts_the_server_with_options_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    entry, command = (json.loads(re.search(rf"^{word} (\[.*\])$", text, re.M)[1]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["kogia", "serve"]
    config = parse_args(ServeConfig, command, prog="kogia serve", description="")
    assert re.search(r"^EXPOSE (\d+)$", text, re.M)[1] == str(config.port)


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    httpx.get(f"{server.url}/health")  # which is counted
    text = httpx.get(f"{server.url}/metrics").text
    known = set(re.findall(r"^([a-z0-9_:]+)\{", text, re.M))
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for expr in asked for name in re.findall(r"(?:vllm:|kogia_|http_)\w+", expr)}
    names -= {"kogia_expert_load"}  # of requests that returned their experts
    assert len(names) > 12 and names <= known, names - known
    labels = {label for expr in asked for label in re.findall(r"(\w+)=~?\"", expr)}
    labels |= {label for expr in asked for label in re.findall(r"by \((\w+)\)", expr)}
    assert labels <= set(re.findall(r'[{,](\w+)="', text)), labels
