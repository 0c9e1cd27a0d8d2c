"""A strict reader of small YAML files: every value knows the line and column it was written at.

YAML 1.1 readers turn ``no`` into false, ``2.0e9`` into text, ``1.20`` into 1.2 and keep the last of two equal
keys. This reader accepts only what every reader agrees on and refuses the rest with the text to type instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from bitwright.compiler.errors import ProfileError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]*)\.[0-9]+([eE][-+][0-9]+)?")
_BOOLEAN_LIKE = re.compile(r"y|n|yes|no|on|off|true|false", re.IGNORECASE)
_NULL_LIKE = re.compile(r"~|null", re.IGNORECASE)
_NUMBER_LIKE = re.compile(
    r"[-+]?\.?[0-9][0-9_,]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"  # 08, 1_000, 1., .5, 2.0e9, 1e9
    r"|[-+]?0[xob][0-9a-fA-F_]+"  # 0x10, 0o17, 0b1
    r"|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"  # 1:30 is 90 in YAML 1.1
    r"|[-+]?\.inf|\.nan",
    re.IGNORECASE,
)
_EXPONENT = re.compile(r"([-+]?[0-9]+)(?:\.([0-9]*))?[eE]([-+]?)([0-9]+)")
_DATE = re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?")


@dataclass(frozen=True)
class Mark:
    """A place in a file; ``line`` and ``column`` count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Scalar:
    """One value; ``text`` is how it was written."""

    value: str | int | float | bool | None
    mark: Mark
    text: str


@dataclass(frozen=True)
class Sequence:
    """A list."""

    items: list[Node]
    mark: Mark


@dataclass(frozen=True)
class Mapping:
    """Named values in file order; ``key_marks`` says where each name stands."""

    entries: dict[str, Node]
    key_marks: dict[str, Mark]
    mark: Mark


Node = Scalar | Sequence | Mapping


def read_file(path: Path, shown: str, *, limit: int = MAX_BYTES) -> Mapping:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: The file; anything but a regular file of at most ``limit`` bytes is refused before it is parsed.
        shown: Its name in messages.
        limit: Most bytes; a profile is a page of text.

    Raises:
        ProfileError: The file cannot be read or breaks a rule of this reader.
    """
    try:
        if not path.is_file():
            raise ProfileError(
                "there is no such file" if not path.exists() else "not a regular file", where=shown
            )
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        msg = f"cannot be read ({error.strerror})"
        raise ProfileError(msg, where=shown) from error
    if len(data) > limit:
        what = f"larger than {limit // 1024} KiB"
        raise ProfileError(what, where=shown, fix="check that this is the right file")
    return parse(_decode(data, shown), shown)


def _decode(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        _refuse("not UTF-8 text", _mark_at(before, shown), "save the file as UTF-8")


def _mark_at(before: str, shown: str) -> Mark:
    return Mark(shown, before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def parse(text: str, shown: str) -> Mapping:
    """Read YAML text whose top level is a mapping.

    Raises:
        ProfileError: With ``file:line:column`` of the first rule that is broken.
    """
    try:
        root = _Builder(shown).build(yaml.parse(text, Loader=_LOADER))
    except yaml.reader.ReaderError as error:
        mark = _mark_at(text[: error.position], shown)
        what = f"the control character {error.character!r} is not text"
        raise ProfileError(what, where=str(mark), fix="remove it") from error
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, shown) from error
    if not isinstance(root, Mapping):
        where = root.mark if root else Mark(shown, 1, 1)
        _refuse("the top level must be a mapping of keys to values", where, "start with 'schema: 1'")
    return root


def _place(shown: str, mark: Any) -> Mark:
    return Mark(shown, mark.line + 1, mark.column + 1) if mark else Mark(shown, 1, 1)


def _syntax_error(error: yaml.MarkedYAMLError, shown: str) -> ProfileError:
    where = _place(shown, error.problem_mark or error.context_mark)
    what = f"not valid YAML: {error.problem or error.context}"
    return ProfileError(
        what, where=str(where), fix="check brackets, indentation (spaces, no tabs) and quotes"
    )


def _refuse(what: str, mark: Mark, fix: str) -> NoReturn:
    raise ProfileError(what, where=str(mark), fix=fix)


@dataclass
class _Open:
    """A collection that is still being read, and the key that waits for its value."""

    node: Sequence | Mapping
    key: str | None = None
    key_mark: Mark | None = None


class _Builder:
    """Turns parser events into nodes without recursion, so that nesting cannot exhaust the stack."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._stack: list[_Open] = []
        self._root: Node | None = None
        self._documents = 0

    def build(self, events: Iterator[yaml.Event]) -> Node | None:
        """Return the root of the only document, or None if there is none."""
        for event in events:
            mark = _place(self._shown, event.start_mark)
            if isinstance(event, yaml.DocumentStartEvent):
                self._start_document(event, mark)
            elif isinstance(event, yaml.AliasEvent):
                _refuse(
                    f"the alias '*{event.anchor}' is not allowed",
                    mark,
                    "write the value out, or use 'extends'",
                )
            elif isinstance(event, yaml.NodeEvent):
                self._start_node(event, mark)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._stack.pop()
        return self._root

    def _start_document(self, event: yaml.DocumentStartEvent, mark: Mark) -> None:
        if event.version or event.tags:
            _refuse("YAML directives are not allowed", mark, "remove the line that starts with '%'")
        self._documents += 1
        if self._documents > 1:
            _refuse("a second document starts here", mark, "keep one profile a file")

    def _start_node(self, event: yaml.NodeEvent, mark: Mark) -> None:
        if event.anchor is not None:
            _refuse(
                f"the anchor '&{event.anchor}' is not allowed", mark, "write the value out, or use 'extends'"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            _refuse(f"the tag '{tag}' is not allowed", mark, "remove it; the schema knows the types")
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event, mark)
            return
        if len(self._stack) == MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH} levels", mark, "no profile key is nested that deep")
        mapping = isinstance(event, yaml.MappingStartEvent)
        node: Sequence | Mapping = Mapping({}, {}, mark) if mapping else Sequence([], mark)
        self._add(node)
        self._stack.append(_Open(node))

    def _scalar(self, event: yaml.ScalarEvent, mark: Mark) -> None:
        top = self._stack[-1] if self._stack else None
        if top is not None and isinstance(top.node, Mapping) and top.key is None:
            self._key(top, top.node, event, mark)
            return
        value = resolve(event.value, mark) if event.implicit[0] else event.value
        self._add(Scalar(value, mark, event.value))

    def _key(self, top: _Open, mapping: Mapping, event: yaml.ScalarEvent, mark: Mark) -> None:
        name = event.value
        if name == "<<":
            _refuse("the merge key '<<' is not allowed", mark, "use 'extends'")
        if event.implicit[0] and not isinstance(resolve(name, mark), str):
            _refuse(f"the key {name} is not a name", mark, f"write it in quotes: '{name}'")
        if name in mapping.entries:
            first = mapping.key_marks[name]
            _refuse(f"duplicate key '{name}' (first on line {first.line})", mark, "keep one of the two")
        top.key, top.key_mark = name, mark

    def _add(self, node: Node) -> None:
        if not self._stack:
            self._root = node
            return
        top = self._stack[-1]
        if isinstance(top.node, Sequence):
            top.node.items.append(node)
        elif top.key is None or top.key_mark is None:
            _refuse("a key must be a name", node.mark, "write 'name: value'")
        else:
            top.node.entries[top.key] = node
            top.node.key_marks[top.key] = top.key_mark
            top.key = top.key_mark = None


def resolve(text: str, mark: Mark) -> str | int | float | bool | None:
    """Return the value of an unquoted scalar, or refuse a form that YAML readers disagree on."""
    if text in ("true", "false"):
        return text == "true"
    if text == "null":
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return _finite(text, mark)
    return _plain_text(text, mark)


def _finite(text: str, mark: Mark) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse(f"the number {text} is too large", mark, "write a finite number")
    return value


def _plain_text(text: str, mark: Mark) -> str:
    if not text:
        _refuse("the value is empty", mark, "write a value, or null to delete an inherited key")
    if _BOOLEAN_LIKE.fullmatch(text):
        fix = f"write true or false, or '{text}' in quotes if text is meant"
        _refuse(f"'{text}' is a truth value to some YAML readers and text to others", mark, fix)
    if _NULL_LIKE.fullmatch(text):
        _refuse(f"'{text}' is one of many spellings of nothing", mark, "write null")
    if _DATE.fullmatch(text):
        _refuse(f"'{text}' is a date to some YAML readers", mark, f"write it in quotes: '{text}'")
    if _NUMBER_LIKE.fullmatch(text):
        _refuse(f"'{text}' is not the same number to every YAML reader", mark, _number_fix(text))
    return text


def _number_fix(text: str) -> str:
    found = _EXPONENT.fullmatch(text)
    if found:
        whole, fraction, sign, digits = found.groups()
        return f"write {whole}.{fraction or '0'}e{sign or '+'}{digits}"
    if text.lstrip("+-").isdigit():
        return f"write {int(text)}, or '{text}' in quotes if text is meant"
    return f"write a plain decimal number, or '{text}' in quotes if text is meant"
