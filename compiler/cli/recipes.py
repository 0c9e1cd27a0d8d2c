"""``recipes``: the shipped recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from bitwright.compiler.cli.output import Output


def recipes_verb(
    out: Output,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Print this recipe as YAML, to start one of your own."),
    ] = None,
) -> None:
    """List the recipes, or print one."""
    from bitwright.compiler.recipe.loader import load_recipe, recipe_names, recipe_text

    if name is not None:
        recipe = load_recipe(name).recipe
        if out.json:
            out.document(recipe.model_dump(mode="json", by_alias=True))
        else:
            out.text(recipe_text(recipe).rstrip("\n"))
        return
    found = [load_recipe(n).recipe for n in recipe_names()]
    if out.json:
        out.document({"recipes": [r.model_dump(mode="json", by_alias=True) for r in found]})
        return
    out.table(
        "", ("Name", "Formats", "Description"), [(r.name, ", ".join(r.formats), r.description) for r in found]
    )
    if out.quiet:
        for recipe in found:
            out.text(recipe.name)
