"""What every section of the page is made of."""

from __future__ import annotations

from bitwright.compiler.report.markup import Child, Markup, element, join

Section = tuple[str, Markup | None]


def anchor(title: str) -> str:
    """Return the identifier that a section's link leads to."""
    return title.lower().replace(" ", "-")


def section(title: str, lead: Child, *parts: Child) -> Section:
    """Return a titled section; nothing inside means no section."""
    inside = join(parts)
    if not inside:
        return title, None
    head = element("p", lead, class_="soft") if lead else None
    return title, element("section", element("h2", title), head, inside, id=anchor(title))


def key(*entries: tuple[str, str]) -> Markup:
    """Return the legend of a picture: (class of the colour, what it stands for)."""
    marks = (part for kind, text in entries for part in (element("i", class_=kind), text))
    return element("div", *marks, class_="key")
