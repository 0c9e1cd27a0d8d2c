"""HTML and SVG elements whose text is escaped by construction: a model's names cannot become markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias

from bitwright.compiler.errors import printable


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"

VOID = frozenset({"meta", "br", "rect", "line", "circle"})


def element(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """Return one element.

    Args:
        tag: Its name.
        children: Markup as it is, text escaped, iterables one after another, None left out.
        attributes: A trailing ``_`` is dropped and other ``_`` become ``-`` (``class_``, ``text_anchor``); None
            and False are left out, True stands alone.
    """
    head = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in VOID and not children:
        return Markup(f"<{tag}{head}>" if tag in ("meta", "br") else f"<{tag}{head}/>")
    return Markup(f"<{tag}{head}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Markup:
    """Return children one after another."""
    return Markup("".join(_text(child) for child in children))


def _text(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int):
        return escape(printable(child))
    return join(child)


def _attribute(name: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f' {name}="{escape(printable(text))}"'
