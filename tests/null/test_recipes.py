"""Recipes: the shipped ones load, broken ones are refused with their line, a plan is read back as a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.compiler.errors import UsageError
from bitwright.compiler.recipe.loader import load_recipe, recipe_names, recipe_text
from bitwright.targets.schema import FORMATS


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_are_named_after_their_file(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.name == name
    assert recipe.description
    assert set(recipe.formats) <= {*FORMATS, "float"}


def test_every_format_has_a_recipe() -> None:
    covered = {f for name in recipe_names() for f in load_recipe(name).recipe.formats}
    assert set(FORMATS) <= covered


REFUSED = [
    ("int9", "--recipe: unknown recipe 'int9'\n  fix: did you mean 'int8'? (a file ends in .yaml)"),
    ("nothing/here.yaml", "nothing/here.yaml: there is no such file"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_unknown_recipes_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert caught.value.message == message


BROKEN = [
    (
        "schema: 1\nname: mine\nformats: [int9]\n",
        "3:11: formats[0]: must be 'int8', 'int8-dynamic', 'int8-row', 'w6a8', 'w5a8', 'w4a8', "
        "'w3a8', 'w2a8', 'ternary-a8', 'binary-a8', 'w8a16', 'fp8', 'w8', 'w4', 'w3', 'w2', 'nf4', 'ternary', "
        "'binary', 'fp8-weights', 'fp16-weights', 'fp16', 'bf16' or 'float', not the text 'int9'\n"
        "  fix: did you mean 'int8'?",
    ),
    (
        "schema: 1\nname: mine\nformats: []\n",
        "3:1: formats: must not be empty\n  fix: write at least one entry",
    ),
    (
        "schema: 1\nname: mine\nformats: [int8]\nmigrat: {smooth: true}\n",
        "4:1: migrat: unknown key 'migrat'\n  fix: did you mean 'migrate'?",
    ),
    (
        "schema: 1\nname: mine\nformats: [int8]\nmigrate: {disassemble: 2.0}\n",
        "4:11: migrate.disassemble: must be at most 0.25, not the number 2.0\n  fix: correct the number",
    ),
    (
        "schema: 1\nname: mine\nformats: [int8]\nrounding: {method: gptp}\n",
        "4:12: rounding.method: must be 'nearest' or 'gptq', not the text 'gptp'\n  fix: did you mean 'gptq'?",
    ),
    (
        "schema: 1\nname: mine\nactivations: []\n",
        "1:1: a plan without the recipe it was made by\n  fix: write the plan again with this version of bitwright",
    ),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_recipes_are_refused_at_their_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert caught.value.message == f"{path}:{message}"


def test_a_plan_is_read_back_as_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "target: x86-avx2\nruntime: artifact\n"
        "recipe: {schema: 1, name: mine, formats: [int8, float]}\n"
        "nodes:\n- {node: conv1, op: Conv, role: anchor, format: float}\n- {node: gelu, op: Gelu, format: float}\n"
        "activations:\n- {tensor: x, low: -1.5, high: 2.0, scale: 0.1}\n"
    )
    loaded = load_recipe(str(path))
    assert loaded.recipe.nodes == {"conv1": "float"}  # operators without a role have no choice
    assert loaded.ranges == {"x": (-1.5, 2.0)}
    assert (loaded.target, loaded.runtime) == ("x86-avx2", "artifact")


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_loads_to_itself(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name).recipe
    path = tmp_path / "again.yaml"
    path.write_text(recipe_text(recipe))
    assert load_recipe(str(path)).recipe == recipe
