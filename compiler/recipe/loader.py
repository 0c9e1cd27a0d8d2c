"""Finding and reading recipes: shipped ones by name, a user's own and plan.yaml files by path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bitwright.compiler.errors import ProfileError, UsageError, nearest
from bitwright.compiler.recipe.schema import Recipe
from bitwright.targets.schema_errors import plain, validated
from bitwright.targets.yaml_reader import Mapping, read_file

_HERE = Path(__file__).parent / "builtin"
LARGEST_FILE = 64 << 20  # a plan.yaml has a line or two for every tensor of a model
OPTION = "--recipe"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and, if it came from a plan.yaml, the ranges that were decided there.

    Attributes:
        recipe: The recipe.
        ranges: Tensor -> (low, high) in real units.
        foldings: Layer of a circuit -> its folding.
        target: Name of the target a plan was made for, or "".
        runtime: Runtime a plan was made for, or "".
    """

    recipe: Recipe
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    foldings: dict[str, dict[str, int]] = field(default_factory=dict)
    target: str = ""
    runtime: str = ""

    def as_plain(self) -> dict[str, Any]:
        """Return the recipe for a plan.yaml: without what the plan itself says node by node."""
        return self.recipe.model_dump(mode="json", by_alias=True, exclude={"nodes"}, exclude_none=True)


def recipe_names() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    return tuple(sorted(path.stem for path in _HERE.glob("*.yaml")))


def recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML with every setting written out."""
    data = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)


def is_recipe_file(name: str) -> bool:
    """Tell whether a name means a file."""
    return name.endswith((".yaml", ".yml")) or "/" in name or "\\" in name


def load_recipe(name: str) -> LoadedRecipe:
    """Read a recipe.

    Args:
        name: A shipped recipe's name, or the path of a recipe or of a plan.yaml.

    Raises:
        UsageError: Unknown name, unreadable file, or a broken rule, with its line and the nearest name.
    """
    if not is_recipe_file(name) and name not in recipe_names():
        what = f"unknown recipe '{name}'"
        raise UsageError(what, where=OPTION, fix=f"{nearest(name, recipe_names())} (a file ends in .yaml)")
    path = Path(name) if is_recipe_file(name) else _HERE / f"{name}.yaml"
    try:
        root = read_file(path, str(path) if is_recipe_file(name) else path.name, limit=LARGEST_FILE)
        return _from_plan(root) if "activations" in root.entries else LoadedRecipe(_recipe(root, plain(root)))
    except ProfileError as error:
        raise UsageError(error.what, where=error.where, fix=error.fix) from error


def _recipe(root: Mapping, data: Any) -> Recipe:
    recipe, findings = validated(Recipe, root, data)
    if recipe is None:
        raise findings[0].error()
    return recipe


def _from_plan(root: Mapping) -> LoadedRecipe:
    """Take a plan's recipe, its formats node by node, and its ranges."""
    data = plain(root)
    section = root.entries.get("recipe")
    if not isinstance(section, Mapping):
        what = "a plan without the recipe it was made by"
        raise ProfileError(
            what, where=str(root.mark), fix="write the plan again with this version of bitwright"
        )
    nodes = {n["node"]: n["format"] for n in _rows(root, data, "nodes", ("node", "format")) if n.get("role")}
    recipe = _recipe(section, {**data["recipe"], "nodes": nodes})
    ranges = {
        a["tensor"]: (float(a["low"]), float(a["high"]))
        for a in _rows(root, data, "activations", ("tensor", "low", "high"))
    }
    foldings = {
        f["layer"]: {name: int(value) for name, value in f.items() if name != "layer"}
        for f in _rows(root, data, "foldings", ("layer",))
    }
    return LoadedRecipe(recipe, ranges, foldings, str(data.get("target", "")), str(data.get("runtime", "")))


def _rows(root: Mapping, data: dict[str, Any], section: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = data.get(section, [])
    if not isinstance(rows, list) or not all(isinstance(r, dict) and all(k in r for k in keys) for r in rows):
        what = f"'{section}' must be a list of entries with {', '.join(keys)}"
        raise ProfileError(what, where=str(root.mark), fix="start from a plan.yaml that compile wrote")
    return rows
