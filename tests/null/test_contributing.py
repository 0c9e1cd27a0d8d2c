"""The recipes of CONTRIBUTING.md, executed as they are written there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a checkout has besides the files that a recipe adds.
COPIED = ("passes", "pyproject.toml", "src/bitwright/__init__.py")
LINKED = ("compiler", "targets", "tests/numeric/pass_harness.py", "tests/numeric/conftest.py")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it is the content of (if named), its text."""

    language: str
    file: str | None
    text: str


def recipe(title: str) -> list[Block]:
    """Return the blocks of one section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [Block(m[1], m[2], m[3]) for m in BLOCK.finditer(section)]


def make_checkout(folder: Path) -> None:
    """Lay out a checkout whose passes may be added to."""
    for name in (*COPIED, *LINKED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    for name in ("compiler", "passes", "targets"):
        (folder / "src" / "bitwright" / name).symlink_to(folder / name)


def run(line: str, folder: Path) -> str:
    """Run one command of a recipe with this interpreter's programs and the folder's package; returns its output."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    words = shlex.split(line)
    program = shutil.which(words[0], path=programs)
    assert program is not None, f"'{words[0]}' is not installed"
    done = subprocess.run([program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def follow(blocks: list[Block], folder: Path) -> dict[str, str]:
    """Write the files and run the commands in order; returns each command's output."""
    printed: dict[str, str] = {}
    for block in blocks:
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        else:
            assert block.language == "sh"
            printed |= {line: run(line, folder) for line in block.text.splitlines()}
    return printed


def test_add_a_pass(tmp_path: Path) -> None:
    blocks = recipe("Add a pass")
    assert [b.file for b in blocks if b.file] == [
        "passes/remove_double_negation.py",
        "tests/numeric/test_remove_double_negation.py",
    ]
    make_checkout(tmp_path)
    printed = follow(blocks, tmp_path)
    assert "2 passed" in next(text for line, text in printed.items() if line.startswith("pytest"))


def test_a_wrong_pass_would_be_noticed(tmp_path: Path) -> None:
    first, *rest = recipe("Add a pass")
    wrong = first.text.replace('is_op(inner, "Neg")', 'is_op(inner, "Abs")')
    assert wrong != first.text
    make_checkout(tmp_path)
    with pytest.raises(AssertionError, match="fired 0 times"):
        follow([Block(first.language, first.file, wrong), *rest], tmp_path)


def test_add_a_target(tmp_path: Path) -> None:
    blocks = recipe("Add a target")
    assert [b.file for b in blocks if b.file] == ["my-board.yaml"]
    make_checkout(tmp_path)
    shown = follow(blocks, tmp_path)["bitwright targets show my-board.yaml"]
    assert "1800000000" in shown or "1.8e+9" in shown or "1.8e+09" in shown
    assert "neon_sdot" in shown
