"""kogia as a wheel, installed where no checkout is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from e2e.kogia_cli import PRETRAIN

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run(*words: str | Path, cwd: Path) -> str:
    """stdout of a program that must succeed, without anything that leads back to the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, since setuptools writes beside them, and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kogia", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source, cwd=folder)
    (found,) = folder.glob("kogia-*.whl")
    return found


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script `kogia` in an environment of its own, which shares all other packages with this one."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    python = environment / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--no-compile", wheel)
    run(*PIP, "--python", python, *install, cwd=wheel.parent)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=wheel.parent).strip()
    # the .pth files of a directory that is added so are not read: an editable kogia stays out of sight
    Path(site, "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return environment / "bin" / "kogia"


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path):
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "kogia").rglob("*") if path.is_file()}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in ours if "__pycache__" not in name}


def test_an_installed_kogia_runs_outside_the_checkout(program: Path, tmp_path: Path):
    where = run(program.parent / "python", "-c", "import kogia; print(kogia.__file__)", cwd=tmp_path)
    assert where.startswith(str(program.parent.parent))
    assert "671.03 B" in run(program, "inspect", "deepseek-r1", cwd=tmp_path)
    assert "cold_start" in run(program, "demo", "--dry-run", cwd=tmp_path)  # recipes are package data


def test_an_installed_kogia_trains_answers_and_verifies(program: Path, tmp_path: Path):
    (tmp_path / "pretrain.toml").write_text(PRETRAIN)
    run(program, "pretrain", "pretrain.toml", "--steps", "2", cwd=tmp_path)
    assert run(program, "generate", "base", "--prompt", "numbers 1 2 3", "--max-tokens", "4", cwd=tmp_path)
    sampling = ("--num-questions", "2", "--num-samples", "1", "--max-tokens", "4")
    assert "pass@1" in run(program, "eval", "base", *sampling, cwd=tmp_path)
    assert (tmp_path / "base" / "evals" / "countdown.jsonl").exists()
