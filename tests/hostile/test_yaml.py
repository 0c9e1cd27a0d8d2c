"""Text that is no YAML we read, and files that are no profile: every message with its line and column."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bitwright.compiler.errors import ProfileError
from bitwright.targets.loader import load_profile

from .bad_profiles import refused, refused_profile

YAML_TRAPS = {
    "duplicate key": (
        "a: 8\nb: 1\na: 4\n",
        "p.yaml:3:1: duplicate key 'a' (first on line 1)\n  fix: keep one of the two",
    ),
    "no": (
        "name: no\n",
        "p.yaml:1:7: 'no' is a truth value to some YAML readers and text to others\n"
        "  fix: write true or false, or 'no' in quotes if text is meant",
    ),
    "off": (
        "per_channel: off\n",
        "p.yaml:1:14: 'off' is a truth value to some YAML readers and text to others\n"
        "  fix: write true or false, or 'off' in quotes if text is meant",
    ),
    "True": (
        "a: True\n",
        "p.yaml:1:4: 'True' is a truth value to some YAML readers and text to others\n"
        "  fix: write true or false, or 'True' in quotes if text is meant",
    ),
    "on as a key": (
        "on: 1\n",
        "p.yaml:1:1: 'on' is a truth value to some YAML readers and text to others\n"
        "  fix: write true or false, or 'on' in quotes if text is meant",
    ),
    "08": (
        "bits: 08\n",
        "p.yaml:1:7: '08' is not the same number to every YAML reader\n"
        "  fix: write 8, or '08' in quotes if text is meant",
    ),
    "2.0e9": (
        "clock_hz: 2.0e9\n",
        "p.yaml:1:11: '2.0e9' is not the same number to every YAML reader\n  fix: write 2.0e+9",
    ),
    "1e-6": (
        "a: 1e-6\n",
        "p.yaml:1:4: '1e-6' is not the same number to every YAML reader\n  fix: write 1.0e-6",
    ),
    "1_000": (
        "a: 1_000\n",
        "p.yaml:1:4: '1_000' is not the same number to every YAML reader\n"
        "  fix: write a plain decimal number, or '1_000' in quotes if text is meant",
    ),
    "sexagesimal": (
        "a: 1:30\n",
        "p.yaml:1:4: '1:30' is not the same number to every YAML reader\n"
        "  fix: write a plain decimal number, or '1:30' in quotes if text is meant",
    ),
    "hexadecimal": (
        "a: 0x10\n",
        "p.yaml:1:4: '0x10' is not the same number to every YAML reader\n"
        "  fix: write a plain decimal number, or '0x10' in quotes if text is meant",
    ),
    "infinity": (
        "a: .inf\n",
        "p.yaml:1:4: '.inf' is not the same number to every YAML reader\n"
        "  fix: write a plain decimal number, or '.inf' in quotes if text is meant",
    ),
    "overflowing float": (
        "a: 1.0e+999\n",
        "p.yaml:1:4: the number 1.0e+999 is too large\n  fix: write a finite number",
    ),
    "huge integer": (
        "a: " + "9" * 30 + "\n",
        f"p.yaml:1:4: '{'9' * 30}' is not the same number to every YAML reader\n"
        f"  fix: write {'9' * 30}, or '{'9' * 30}' in quotes if text is meant",
    ),
    "date": (
        "date: 2026-11-22\n",
        "p.yaml:1:7: '2026-11-22' is a date to some YAML readers\n  fix: write it in quotes: '2026-11-22'",
    ),
    "tilde": ("a: ~\n", "p.yaml:1:4: '~' is one of many spellings of nothing\n  fix: write null"),
    "empty value": (
        "a:\nb: 1\n",
        "p.yaml:1:3: the value is empty\n  fix: write a value, or null to delete an inherited key",
    ),
    "number as a key": ("8: a\n", "p.yaml:1:1: the key 8 is not a name\n  fix: write it in quotes: '8'"),
    "list as a key": ("[a]: b\n", "p.yaml:1:1: a key must be a name\n  fix: write 'name: value'"),
    "merge key": ("a: {<<: 1}\n", "p.yaml:1:5: the merge key '<<' is not allowed\n  fix: use 'extends'"),
    "anchor": (
        "a: &x 1\n",
        "p.yaml:1:4: the anchor '&x' is not allowed\n  fix: write the value out, or use 'extends'",
    ),
    "alias": (
        "a: 1\nb: *x\n",
        "p.yaml:2:4: the alias '*x' is not allowed\n  fix: write the value out, or use 'extends'",
    ),
    "code in a tag": (
        "a: !!python/object/apply:os.system [ls]\n",
        "p.yaml:1:4: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed\n"
        "  fix: remove it; the schema knows the types",
    ),
    "harmless tag": (
        "a: !!str 1\n",
        "p.yaml:1:4: the tag 'tag:yaml.org,2002:str' is not allowed\n  fix: remove it; the schema knows the types",
    ),
    "two documents": (
        "a: 1\n---\nb: 2\n",
        "p.yaml:2:1: a second document starts here\n  fix: keep one profile a file",
    ),
    "directive": (
        "%YAML 1.1\n---\na: 1\n",
        "p.yaml:1:1: YAML directives are not allowed\n  fix: remove the line that starts with '%'",
    ),
    "list at the top": (
        "- 1\n",
        "p.yaml:1:1: the top level must be a mapping of keys to values\n  fix: start with 'schema: 1'",
    ),
    "text at the top": (
        "hello\n",
        "p.yaml:1:1: the top level must be a mapping of keys to values\n  fix: start with 'schema: 1'",
    ),
    "empty file": (
        "",
        "p.yaml:1:1: the top level must be a mapping of keys to values\n  fix: start with 'schema: 1'",
    ),
    "unclosed bracket": (
        "a: [1,\n",
        "p.yaml:2:1: not valid YAML: did not find expected node content\n"
        "  fix: check brackets, indentation (spaces, no tabs) and quotes",
    ),
    "tab": (
        "a:\n\tb: 1\n",
        "p.yaml:2:1: not valid YAML: found character that cannot start any token\n"
        "  fix: check brackets, indentation (spaces, no tabs) and quotes",
    ),
    "too deep": (
        "a: " + "[" * 20000,
        "p.yaml:1:19: nested deeper than 16 levels\n  fix: no profile key is nested that deep",
    ),
}


@pytest.mark.parametrize("trap", YAML_TRAPS)
def test_yaml_trap(trap: str) -> None:
    text, message = YAML_TRAPS[trap]
    started = time.perf_counter()
    assert refused(text) == message
    assert time.perf_counter() - started < 2  # 20,000 brackets took 8 s in a recursive reader


def test_control_character_points_at_itself() -> None:
    assert refused("a: 1\nb: x\x07y\n").startswith("p.yaml:2:5: the control character")


def test_alias_bomb_is_refused_at_its_first_anchor() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert refused(bomb).startswith("p.yaml:1:4: the anchor '&a' is not allowed")


def test_file_larger_than_the_cap_is_not_parsed(tmp_path: Path) -> None:
    message = refused_profile(tmp_path, "a: " + "[" * 1_100_000)
    assert message == ("board.yaml: larger than 1024 KiB\n  fix: check that this is the right file")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(b"schema: 1\nname: b\xff\n")
    with pytest.raises(ProfileError, match=r"p\.yaml:2:8: not UTF-8 text\n  fix: save the file as UTF-8"):
        load_profile(path)


def test_missing_file_folder_and_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name, what in [
        ("none", "there is no such file"),
        ("folder", "not a regular"),
        ("pipe", "not a regular"),
    ]:
        with pytest.raises(ProfileError, match=what):
            load_profile(tmp_path / f"{name}.yaml")
