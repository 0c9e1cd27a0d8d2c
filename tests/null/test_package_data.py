"""Every file that the package reads is in its wheels."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2]
SOURCES = ("compiler", "passes", "targets")


def test_every_file_that_is_no_python_is_package_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    named = {
        f"{package.removeprefix('bitwright.').replace('.', '/')}/{pattern}"
        for package, found in patterns.items()
        for pattern in found
    }
    files = [p for folder in SOURCES for p in (ROOT / folder).rglob("*") if p.is_file()]
    data = [
        PurePosixPath(p.relative_to(ROOT))
        for p in files
        if p.suffix != ".py" and "__pycache__" not in p.parts
    ]
    assert len(data) > 40
    assert [str(p) for p in data if not any(matches(p, pattern) for pattern in named)] == []


def matches(path: PurePosixPath, pattern: str) -> bool:
    """Tell whether a path matches a pattern part by part: a star crosses no folder, as in setuptools."""
    parts = PurePosixPath(pattern).parts
    return len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts))
