"""What runs on integers, which tensors get a quantizer, which scales are tied."""

from __future__ import annotations

import pytest
from plan_models import CNN, CONCAT, MLP_ISLANDS, build

from bitwright.compiler.plan.planner import plan_selection
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.ties import tie_groups
from bitwright.targets.loader import load_profile

PROFILE = load_profile("x86-avx512-vnni")


def selection_of(text: str, runtime: str = "artifact", keep_float: frozenset[str] = frozenset()) -> Selection:
    return plan_selection(build(text), PROFILE, runtime, {}, keep_float=keep_float)  # type: ignore[arg-type]


def integer_names(selection: Selection) -> list[str]:
    return [u.name for u in selection.units if u in selection.integer]


def quantized_names(selection: Selection) -> list[str]:
    return [v.name or "" for v in selection.quantized]


def test_a_cnn_runs_on_integers_from_its_input_to_its_last_layer() -> None:
    selection = selection_of(CNN)
    assert integer_names(selection) == ["c1", "c2", "s", "p", "f", "g"]
    assert "Softmax has no integer kernel" in selection.reasons["y"]


def test_no_quantizer_inside_a_fused_chain() -> None:
    quantized = quantized_names(selection_of(CNN))
    assert quantized == ["x", "r1", "c2", "r2", "p", "f"]
    assert "c1" not in quantized, "between Conv and its Relu"
    assert "s" not in quantized, "between Add and its Relu"
    assert "g" not in quantized, "a float result that only Softmax reads"


def test_attention_products_and_islands_stay_in_float() -> None:
    selection = selection_of(MLP_ISLANDS)
    assert integer_names(selection) == ["q", "k", "m"]
    assert quantized_names(selection) == ["n", "v"]
    assert "attention product" in selection.reasons["scores"]
    assert "float" in selection.reasons["y"], "the residual Add reads float results"
    assert selection.reasons["kt"], "a Transpose between float operators stays"


def test_float_readers_of_a_float_producer_read_the_unquantized_value() -> None:
    selection = selection_of(MLP_ISLANDS)
    assert {v.name for v in selection.float_readers} == {"n", "v"}


def test_keeping_a_layer_in_float_takes_its_followers_along() -> None:
    selection = selection_of(CNN, keep_float=frozenset({"c2"}))
    assert "s" not in integer_names(selection), "one operand of the Add is float now"
    assert selection.reasons["c2"] == "kept in float on request"
    assert "computed in float" in selection.reasons["s"]


def test_followers_are_dropped_when_nobody_reads_integers() -> None:
    selection = selection_of(CNN, keep_float=frozenset({"g"}))
    assert integer_names(selection) == ["c1", "c2"]
    assert selection.reasons["p"] == "nothing behind it reads integers"


def test_onnxruntime_convolutions_always_write_integers() -> None:
    selection = selection_of(CONCAT, "onnxruntime")
    assert "y" in quantized_names(selection), "ONNX Runtime has QLinearConv only with a quantizer behind it"
    assert "y" not in quantized_names(selection_of(CONCAT, "artifact"))


def test_concat_and_pooling_tie_scales() -> None:
    groups = tie_groups(selection_of(CONCAT))
    assert groups["a"] == groups["b"] == groups["c"] == groups["m"] == ("a", "b", "c", "m")
    assert groups["x"] == ("x",)


def test_carriers_tie_scales_but_arithmetic_does_not() -> None:
    groups = tie_groups(selection_of(CNN))
    assert groups["p"] == ("f", "p")
    assert groups["c2"] == ("c2",)


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS, CONCAT])
def test_selection_is_a_fixed_point(text: str) -> None:
    model = build(text)
    first = plan_selection(model, PROFILE, "artifact", {})
    floats = frozenset(u.name for u in first.units if u.role and u not in first.integer)
    second = plan_selection(model, PROFILE, "artifact", {}, keep_float=floats)
    assert integer_names(second) == integer_names(first)
