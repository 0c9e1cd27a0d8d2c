"""Choosing formats layer by layer: budgets are kept, a plan given back as a recipe makes the same model."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import yaml
from allocation_models import CNN, MLP, SAMPLES, build

from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import InfeasibleBudgetError, UsageError
from bitwright.compiler.options import Options


@pytest.fixture(scope="module", params=[CNN, MLP], ids=["cnn", "mlp"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    ir.save(build(request.param), path)
    return path, request.param


@pytest.fixture(scope="module")
def first(model: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return _quantize(model, tmp_path_factory.mktemp("first"))


def _quantize(model: tuple[Path, str], folder: Path, **options: object) -> Deployment:
    path, text = model
    given = {"target": "x86-avx512-vnni", "data": SAMPLES[text], "gate": False, **options}
    return quantize(Options(model=path, output=folder / "q.onnx", **given))  # type: ignore[arg-type]


def _integers(model: Path) -> dict[str, bytes]:
    tensors = ir.load(model).graph.initializers.values()
    return {v.name or "": v.const_value.numpy().tobytes() for v in tensors if v.const_value is not None}


def test_a_size_budget_is_kept_and_the_report_says_what_it_costs(
    model: tuple[Path, str], tmp_path: Path
) -> None:
    full = sum(v.const_value.nbytes for v in ir.load(model[0]).graph.initializers.values())  # type: ignore[union-attr]
    made = _quantize(model, tmp_path, budget={"size": full * 0.5}, recipe="mixed")
    notes = [line for p in made.report["phases"] if p["name"] == "allocate" for line in p["notes"]]  # type: ignore[index]
    assert any("proven optimal" in line for line in notes)
    assert any(line.startswith("weights: ") for line in notes), notes
    formats = {row["node"]: row["format"] for row in made.report["layers"] if row["role"] == "anchor"}  # type: ignore[index]
    assert set(formats.values()) - {"float"}
    # Predicted are weights and scales; zero points and integer biases of a few layers come on top.
    assert sum(map(len, _integers(made.model).values())) < full * 0.55


def test_a_budget_nobody_can_meet_is_refused_with_the_nearest_point(
    model: tuple[Path, str], tmp_path: Path
) -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        _quantize(model, tmp_path, budget={"size": 8.0})
    assert caught.value.exit_code == 4
    assert "size" in caught.value.message or "weight" in caught.value.message
    assert not list(tmp_path.iterdir())


def test_a_plan_given_back_makes_the_same_model(
    model: tuple[Path, str], first: Deployment, tmp_path: Path
) -> None:
    again = _quantize(model, tmp_path, recipe=str(first.plan))
    assert _integers(first.model) == _integers(again.model)
    assert first.plan.read_text() == again.plan.read_text()


def test_an_edited_plan_is_obeyed(model: tuple[Path, str], first: Deployment, tmp_path: Path) -> None:
    text = first.plan.read_text()
    node = next(n for n in yaml.safe_load(text)["nodes"] if n["format"] == "int8" and n["role"] == "anchor")
    edited = tmp_path / "edited.yaml"
    edited.write_text(text.replace("format: int8", "format: float", 1))
    again = _quantize(model, tmp_path, recipe=str(edited))
    formats = {row["node"]: row["format"] for row in again.report["layers"]}  # type: ignore[index]
    assert formats[node["node"]] == "float"
    assert "int8" in formats.values()


def test_a_plan_for_another_model_is_refused(
    model: tuple[Path, str], first: Deployment, tmp_path: Path
) -> None:
    text = first.plan.read_text()
    node = next(n for n in yaml.safe_load(text)["nodes"] if n["role"] == "anchor")["node"]
    foreign = tmp_path / "foreign.yaml"
    foreign.write_text(text.replace(f"node: {node}\n", "node: elsewhere\n"))
    with pytest.raises(UsageError, match="the model has no node 'elsewhere'"):
        _quantize(model, tmp_path / "b", recipe=str(foreign))
    assert not (tmp_path / "b").exists()
