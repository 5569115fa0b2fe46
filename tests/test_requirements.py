"""The pins, their hashes, and the ranges of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^ ;]+)(?: ; [^\\]+)?((?: --hash=sha256:[0-9a-f]{64})+)")


def pins(path: Path) -> dict[str, str]:
    """Name -> version of the lines of a lock file, each of which must be a pin with hashes."""
    text = path.read_text().replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), [line[:80] for line, match in zip(lines, found) if match is None]
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_line_of_a_lock_file_is_a_pin_with_hashes(path: Path):
    assert pins(path)


def test_the_files_that_share_an_environment_name_each_package_once():
    names = [name for stem in ("build", "lock", "dev") for name in pins(ROOT / f"requirements/{stem}.txt")]
    assert len(set(names)) == len(names)


def test_every_range_of_the_project_holds_its_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    lock, build = pins(ROOT / "requirements/lock.txt"), pins(ROOT / "requirements/build.txt")
    everything = lock | pins(ROOT / "requirements/dev.txt")
    ranges = [
        *((line, lock) for line in project["project"]["dependencies"]),
        *((line, everything) for extra in ("dev", "parquet", "telemetry") for line in extras[extra]),
        *((line, build) for line in project["build-system"]["requires"]),
    ]
    for line, pinned in ranges:
        requirement = Requirement(line)
        if requirement.name != "torch":  # the user's choice
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{line}, pinned at {version}"
