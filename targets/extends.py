"""How ``extends`` puts a profile together: a deep merge that keeps where each value was written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.yaml_reader import Mapping, Mark, Node, Scalar, Sequence

MAX_LEVELS = 8
MAX_FILES = 64
NUMBER_SECTIONS = ("clock_hz", "compute", "memory", "efficiency", "overheads")
OPTIONAL_NUMBER_SECTIONS = ("energy", "measured")
OWN_KEYS = ("schema", "name", "description", "extends", "abstract")
"""Keys that belong to one file and are never inherited."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.ya?ml")


@dataclass(frozen=True)
class Source:
    """One file of a profile.

    Attributes:
        name: What cycles are reported by: the built-in name or the file name.
        folder: Folder in which a file given by its name is looked for; None for built-in files.
        read: Parses the file.
    """

    name: str
    folder: Path | None
    read: Callable[[], Mapping]


Find = Callable[[str, Source], Source]
"""Finds the source behind a name in ``extends``, as seen from the file that names it; raises ProfileError."""


@dataclass
class _Resolver:
    find: Find
    files: int = 0
    chain: list[str] = field(default_factory=list)

    def resolve(self, source: Source, at: Mark | None) -> Mapping:
        self._guard(source, at)
        self.chain.append(source.name)
        own = source.read()
        check_own_keys(own)
        merged: Mapping | None = None
        for entry in _parents(own):
            parent = self.resolve(self._find(entry, source), entry.mark)
            merged = parent if merged is None else merge(merged, parent)
        self.chain.pop()
        parts = Mapping(
            {k: v for k, v in own.entries.items() if k not in OWN_KEYS or not self.chain},
            own.key_marks,
            own.mark,
        )
        return merge(merged or Mapping({}, {}, own.mark), parts)

    def _find(self, entry: Scalar, source: Source) -> Source:
        try:
            return self.find(str(entry.value), source)
        except ProfileError as error:
            raise ProfileError(error.what, where=f"{entry.mark}: extends", fix=error.fix) from error

    def _guard(self, source: Source, at: Mark | None) -> None:
        self.files += 1
        where = f"{at}: extends" if at else source.name
        if source.name in self.chain:
            loop = " -> ".join([*self.chain[self.chain.index(source.name) :], source.name])
            msg = f"a profile extends itself: {loop}"
            raise ProfileError(msg, where=where, fix="break the circle")
        if len(self.chain) == MAX_LEVELS:
            msg = f"more than {MAX_LEVELS} levels of extends"
            raise ProfileError(msg, where=where, fix="extend fewer levels")
        if self.files > MAX_FILES:
            msg = f"more than {MAX_FILES} files in one profile"
            raise ProfileError(msg, where=where, fix="extend fewer files")


def resolve(source: Source, find: Find) -> Mapping:
    """Return the profile with everything it extends merged in, later over earlier, its own keys over all.

    Raises:
        ProfileError: A file breaks a rule, is unknown, or extends itself.
    """
    return _Resolver(find).resolve(source, None)


def _parents(own: Mapping) -> list[Scalar]:
    node = own.entries.get("extends")
    if node is None:
        return []
    items = node.items if isinstance(node, Sequence) else [node]
    names: list[Scalar] = []
    for item in items:
        if not isinstance(item, Scalar) or not isinstance(item.value, str):
            _refuse(item.mark, "extends", "must be a name or a list of names", "write 'extends: x86-avx2'")
        if item.value in (known.value for known in names):
            _refuse(item.mark, "extends", f"'{item.value}' is named twice", "keep one of the two")
        names.append(item)
    return names


def check_own_keys(own: Mapping) -> None:
    """Check what every single file must keep, before it is merged.

    Raises:
        ProfileError: No ``schema: 1``; ``abstract`` is not a truth value; numbers without provenance.
    """
    version = own.entries.get("schema")
    if version is None:
        _refuse(own.mark, "schema", "missing key 'schema'", "write 'schema: 1' in every file")
    if not isinstance(version, Scalar) or version.value != 1 or isinstance(version.value, bool):
        shown = version.text if isinstance(version, Scalar) else "a collection"
        _refuse(version.mark, "schema", f"schema version {shown} is not known here", "write 'schema: 1'")
    abstract = own.entries.get("abstract")
    if abstract is not None and not (isinstance(abstract, Scalar) and isinstance(abstract.value, bool)):
        _refuse(abstract.mark, "abstract", "must be true or false", "write 'abstract: true'")
    _check_provenance(own)


def _check_provenance(own: Mapping) -> None:
    given = own.entries.get("provenance")
    sources = given.entries if isinstance(given, Mapping) else {}
    for section in (*NUMBER_SECTIONS, *OPTIONAL_NUMBER_SECTIONS, "runtimes"):
        node = own.entries.get(section)
        if node is None or (isinstance(node, Scalar) and node.value is None) or section in sources:
            continue
        if section == "runtimes" and not _has_threshold(node):
            continue
        entry = f"{{{section}: {{source: ..., confidence: measured|datasheet|estimate}}}}"
        fix = f"add 'provenance: {entry}' to this file"
        _refuse(own.key_marks[section], section, f"the numbers of '{section}' have no provenance", fix)


def _has_threshold(node: Node) -> bool:
    """Tell whether a ``min_macs`` other than 0 (no threshold) is set anywhere below ``node``."""
    if isinstance(node, Mapping):
        own = node.entries.get("min_macs")
        set_here = isinstance(own, Scalar) and own.value not in (0, None)
        return set_here or any(_has_threshold(v) for v in node.entries.values())
    return isinstance(node, Sequence) and any(_has_threshold(v) for v in node.items)


def merge(base: Mapping, over: Mapping, path: tuple[str, ...] = ()) -> Mapping:
    """Return ``base`` with ``over`` merged in.

    Mappings merge key by key; null deletes a key; lists whose rows all have a name merge row by row;
    everything else is replaced. A provenance entry is replaced as a whole: half of an old source proves
    nothing.
    """
    entries, marks = dict(base.entries), dict(base.key_marks)
    for key, value in over.entries.items():
        old = entries.get(key)
        marks[key] = over.key_marks[key]
        if isinstance(value, Scalar) and value.value is None:
            if entries.pop(key, None) is None:
                entries[key] = value  # nothing to delete: the schema decides whether the key may be null
        elif isinstance(old, Mapping) and isinstance(value, Mapping) and path != ("provenance",):
            entries[key] = merge(old, value, (*path, key))
        elif isinstance(old, Sequence) and isinstance(value, Sequence) and _named(old) and _named(value):
            entries[key] = _merge_rows(old, value, (*path, key))
        else:
            entries[key] = value
    return Mapping(entries, marks, over.mark)


def _row_name(row: Node) -> str | None:
    name = row.entries.get("name") if isinstance(row, Mapping) else None
    return name.value if isinstance(name, Scalar) and isinstance(name.value, str) else None


def _named(rows: Sequence) -> bool:
    return bool(rows.items) and all(_row_name(row) is not None for row in rows.items)


def _merge_rows(base: Sequence, over: Sequence, path: tuple[str, ...]) -> Sequence:
    rows: list[tuple[str, Mapping]] = [(str(_row_name(r)), r) for r in base.items if isinstance(r, Mapping)]
    behind: int | None = None
    seen: set[str] = set()
    for row in over.items:
        assert isinstance(row, Mapping)
        name = str(_row_name(row))
        shown = ".".join(path)
        if name in seen:
            _refuse(row.mark, shown, f"two rows are named '{name}'", "rename or remove one")
        seen.add(name)
        place = next((i for i, (known, _) in enumerate(rows) if known == name), None)
        if _is_removal(row):
            if place is None:
                fix = nearest(name, [known for known, _ in rows])
                _refuse(row.mark, shown, f"there is no inherited row '{name}' to remove", fix)
            del rows[place]
            behind = place - 1
        elif place is not None:
            rows[place] = (name, merge(rows[place][1], row, (*path, name)))
            behind = place
        else:
            behind = _first_place(over, rows) if behind is None else behind + 1
            rows.insert(behind, (name, row))
    return Sequence([row for _, row in rows], over.mark)


def _first_place(over: Sequence, rows: list[tuple[str, Mapping]]) -> int:
    """Return where new rows at the head of a list go: before the first inherited row named, else last."""
    known = [name for name, _ in rows]
    return next((known.index(n) for row in over.items if (n := str(_row_name(row))) in known), len(rows))


def _is_removal(row: Mapping) -> bool:
    flag = row.entries.get("remove")
    return isinstance(flag, Scalar) and flag.value is True and set(row.entries) == {"name", "remove"}


def is_file_name(text: str) -> bool:
    """Tell whether an ``extends`` entry names a file (``board.yaml``) and not a built-in profile."""
    return text.endswith((".yaml", ".yml"))


def sibling(text: str, folder: Path | None, at: str) -> Path:
    """Return the path of a file named in ``extends``; only plain names inside the same folder are allowed.

    Raises:
        ProfileError: The name has a folder in it, points out of the folder, or ``at`` is a built-in profile.
    """
    if folder is None or not _FILE_NAME.fullmatch(text):
        what = f"'{text}' is not a plain file name; only files in the same folder can be extended"
        raise ProfileError(what, where=at, fix="copy the file beside this one, or name a built-in profile")
    path = folder / text
    if path.resolve().parent != folder.resolve():
        msg = f"'{text}' is a link out of its folder"
        raise ProfileError(msg, where=at, fix="copy the file instead")
    return path


def _refuse(mark: Mark, path: str, what: str, fix: str) -> NoReturn:
    raise ProfileError(what, where=f"{mark}: {path}", fix=fix)
