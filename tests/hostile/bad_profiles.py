"""How a bad profile is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitwright.compiler.errors import ProfileError
from bitwright.targets.loader import load_profile
from bitwright.targets.yaml_reader import parse

HEAD = """schema: 1
name: board
extends: arm-cortex-a76
description: A board.
"""


def refused(text: str) -> str:
    with pytest.raises(ProfileError) as caught:
        parse(text, "p.yaml")
    assert caught.value.exit_code == 2
    return caught.value.message


def written(tmp_path: Path, text: str, name: str = "board.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def refused_profile(tmp_path: Path, text: str) -> str:
    path = written(tmp_path, text)
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    return caught.value.message.replace(f"{tmp_path}{os.sep}", "")
