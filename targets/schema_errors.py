"""A YAML file against a strict schema: every broken rule with its place in the file and what to write instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.targets.yaml_reader import Mapping, Node, Scalar, Sequence

Path = tuple[str | int, ...]
T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        where: ``file:line:column: key.path``.
        what: The rule.
        fix: What to write instead.
    """

    where: str
    what: str
    fix: str

    def error(self) -> ProfileError:
        """Return the finding as an exception."""
        return ProfileError(self.what, where=self.where, fix=self.fix)


def plain(node: Node) -> Any:
    """Return the node as plain Python data."""
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.entries.items()}
    if isinstance(node, Sequence):
        return [plain(value) for value in node.items]
    return node.value


def place(root: Mapping, path: Path) -> str:
    """Return ``file:line:column: a.b[0].c`` of the deepest part of ``path`` that is in the file."""
    node: Node = root
    mark = root.mark
    for part in path:
        if isinstance(node, Mapping) and part in node.entries:
            mark, node = node.key_marks[str(part)], node.entries[str(part)]
        elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
            mark = node.mark
        else:
            break
    return f"{mark}: {shown_path(path)}" if path else str(mark)


def shown_path(path: Path) -> str:
    """Return a key path as text, e.g. ``compute[0].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _node_at(root: Mapping, path: Path) -> Node | None:
    node: Node | None = root
    for part in path:
        if isinstance(node, Mapping):
            node = node.entries.get(str(part))
        elif isinstance(node, Sequence) and isinstance(part, int) and part < len(node.items):
            node = node.items[part]
        else:
            return None
    return node


def validated(schema: type[T], root: Mapping, data: Any) -> tuple[T | None, list[Finding]]:
    """Return the record, or None and every rule of the schema that is broken.

    Args:
        schema: A strict pydantic model.
        root: Where everything was written.
        data: What to validate: ``plain(root)``, possibly completed.
    """
    try:
        # JSON mode is the strict mode in which a list is a tuple; text is still never a number.
        return schema.model_validate_json(json.dumps(data)), []
    except ValidationError as error:
        return None, [_finding(schema, root, dict(e)) for e in error.errors(include_url=False)]


def _finding(schema: type[BaseModel], root: Mapping, error: dict[str, Any]) -> Finding:
    path: Path = tuple(part for part in error["loc"] if part != "[key]")
    what, fix = _explain(schema, root, path, error)
    return Finding(place(root, path), what, fix)


def _explain(schema: type[BaseModel], root: Mapping, path: Path, error: dict[str, Any]) -> tuple[str, str]:
    kind, context = error["type"], error.get("ctx", {})
    node = _node_at(root, path)
    found = _describe(node)
    if kind == "extra_forbidden":
        return f"unknown key '{path[-1]}'", nearest(str(path[-1]), _known_keys(schema, path[:-1]))
    if kind == "missing":
        return f"missing key '{path[-1]}'", f"write '{path[-1]}: ...', or extend a profile that has it"
    if kind == "literal_error":
        choices = str(context["expected"])
        names = choices.replace(" or ", ", ").replace("'", "").split(", ")
        hint = nearest(node.text, names) if isinstance(node, Scalar) else f"known: {choices}"
        return f"must be {choices}, not {found}", hint
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, not {found}", _type_fix(kind, node)
    if kind in _BOUNDS:
        bound = next(iter(context.values()))
        return f"must be {_BOUNDS[kind]} {bound:g}, not {found}", "correct the number"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty", "write at least one entry"
    if kind == "string_pattern_mismatch" and "times" in path:
        return f"'{path[-1]}' is not the signature of a call", "measure with 'bitwright targets probe'"
    if kind == "string_pattern_mismatch":
        fix = "use lower-case letters, digits, '-', '_' and '.', at most 64"
        return f"{found} is not a name", fix
    return str(error["msg"]).lower(), "see the documentation of this file"


_TYPES = {
    "string_type": "text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def _describe(node: Node | None) -> str:
    if isinstance(node, Mapping):
        return "a mapping"
    if isinstance(node, Sequence):
        return "a list"
    if node is None or node.value is None:
        return "null"
    if isinstance(node.value, str):
        return f"the text '{node.value}'"
    return node.text if isinstance(node.value, bool) else f"the number {node.text}"


def _type_fix(kind: str, node: Node | None) -> str:
    if kind == "string_type" and isinstance(node, Scalar) and node.value is not None:
        return f"write it in quotes: '{node.text}'"
    if kind in ("tuple_type", "list_type"):
        return "write [a, b]"
    if kind in ("dict_type", "model_type"):
        return "write {key: value} or indented lines"
    return f"write {_TYPES[kind]}, without quotes"


@cache
def _json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    return schema.model_json_schema(by_alias=True)


def _known_keys(model: type[BaseModel], path: Path) -> tuple[str, ...]:
    """Return the keys that the schema allows at ``path``."""
    schema = _json_schema(model)
    at: dict[str, Any] = schema
    for part in path:
        if isinstance(part, int):
            at = at.get("items", {})
        else:
            at = at.get("properties", {}).get(part) or at.get("additionalProperties", {})
        options = [o for o in at.get("anyOf", [at]) if o.get("type") != "null"]
        at = options[0]
        if "$ref" in at:
            at = schema["$defs"][at["$ref"].rsplit("/", 1)[1]]
    return tuple(at.get("properties", {}))
