"""The report's sections on how the formats came about: recipe, migration, allocation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bitwright.compiler.allocate.notes import allocation_notes, is_proven
from bitwright.compiler.compilation import Compilation


def recipe_section(c: Compilation) -> dict[str, Any]:
    """Return the recipe, where it came from, and how many formats of nodes and ranges of tensors it fixes."""
    return {
        **c.recipe.as_plain(),
        "asked_for": c.options.recipe,
        "fixed_nodes": len(c.recipe.recipe.nodes),
        "fixed_ranges": len(c.recipe.ranges),
    }


def migration_section(c: Compilation) -> list[dict[str, Any]]:
    """Return what every rewrite of the migration changed, in the order in which they ran."""
    return [
        {"rewrite": name, "changes": c.migrated.get(name, 0), "notes": list(notes)}
        for name, notes in c.migrations.items()
    ]


def allocation_section(c: Compilation) -> dict[str, Any] | None:
    """Return what the allocator chose, its certificate, and the price of every budget; None if nothing was chosen."""
    found = c.allocation
    if found is None:
        return None
    return {
        "formats": dict(found.formats),
        "totals": asdict(found.totals),
        "objective": found.objective,
        "value": found.value,
        "bound": found.bound,
        "gap": found.gap,
        "proven": is_proven(found),
        "budgets": [asdict(price) for price in found.prices],
        "dropped": [asdict(dropped) for dropped in found.dropped],
        "seconds": found.seconds,
        "notes": allocation_notes(found),
    }
