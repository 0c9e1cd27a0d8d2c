"""What README.md and the other pages point to exists, and the commands they show have the options they use."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#]+?)(?:#[^)]*)?\)")
ANCHOR = re.compile(r"\]\(((?!http)[^)#]*)#([^)]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
OUR_FILE = re.compile(r"(?<![\w./-])(?:compiler|passes|targets|tests|benchmarks|examples|docs)/[\w./-]+")
# What pages tell readers to add.
INVENTED = {"CONTRIBUTING.md": {"passes/remove_double_negation.py", "targets/FAMILY"}}
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = Path(sys.executable).with_name("bitwright")


def commands() -> list[str]:
    """Return every command line of ours that the pages show, each once."""
    texts = (page.read_text(encoding="utf-8") for page in PAGES)
    lines = (line for text in texts for block in SHELL_BLOCK.findall(text) for line in block.splitlines())
    return sorted({line.split("#")[0].strip() for line in lines if line.startswith("bitwright ")})


@cache
def help_of(verb: tuple[str, ...]) -> str:
    done = subprocess.run(
        [PROGRAM, *verb, "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "160"},
    )
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    targets = [t for t in LINK.findall(page.read_text(encoding="utf-8")) if not t.startswith("http")]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def anchor_of(heading: str) -> str:
    """Return what a link to a heading says behind its #."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_headings_lead_to_some(page: Path) -> None:
    dead = []
    for file, anchor in ANCHOR.findall(page.read_text(encoding="utf-8")):
        text = (page.parent / file if file else page).read_text(encoding="utf-8")
        if anchor not in map(anchor_of, HEADING.findall(FENCED.sub("", text))):
            dead.append(f"{file}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_are_named_are_there(page: Path) -> None:
    spans = CODE.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    named = {name.rstrip("/.") for span in spans for name in OUR_FILE.findall(span)}
    assert {n for n in named if not (ROOT / n).exists()} <= INVENTED.get(page.name, set())


@pytest.mark.parametrize("line", commands())
def test_commands_have_the_options_they_show(line: str) -> None:
    words = shlex.split(line)[1:]
    verb = tuple(words[:2]) if words[0] == "targets" else (words[0],)
    options = [w.split("=")[0] for w in words if w.startswith("-")]
    text = help_of(verb)
    assert [o for o in options if not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", text)] == []


def test_the_three_journeys_are_shown() -> None:
    shown = " ".join(commands())
    assert all(f"bitwright {verb} " in shown for verb in ("quantize", "compile", "verify", "targets"))
