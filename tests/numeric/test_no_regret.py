"""The no-regret gate decides by measurement: what is slower as integers is left in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import onnx_ir as ir
import pytest
from plan_models import CNN, CONCAT, build

from bitwright.compiler.ort import no_regret as gate
from bitwright.compiler.ort.session import SessionConfig, open_session
from bitwright.compiler.ort.timing import ROUND_S, PairedTiming, time_paired, time_reopened
from bitwright.compiler.plan.planner import plan_selection
from bitwright.targets.loader import load_profile

PROFILE = load_profile("x86-avx512-vnni")


def timing(ratio: float) -> PairedTiming:
    return PairedTiming(ratio, 0.0, ratio, 1.0, 1)


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., gate.GateResult]:
    """Run the gate with sessions that are names of what is in float, and times from a table."""

    def run(
        groups: dict[str, frozenset[str]], seconds: Callable[[frozenset[str] | None], float]
    ) -> gate.GateResult:
        def ratio(first: object, second: object, *_: object, **__: object) -> PairedTiming:
            a, b = (x() if callable(x) else x for x in (first, second))
            return timing(seconds(a) / seconds(b))  # type: ignore[arg-type]

        monkeypatch.setattr(gate, "open_session", lambda model, *_: model)
        monkeypatch.setattr(gate, "time_paired", ratio)
        monkeypatch.setattr(gate, "time_reopened", ratio)
        return gate.no_regret(None, lambda keep: keep, groups, [], SessionConfig())  # type: ignore[arg-type, return-value]

    return run


GROUPS = {"Conv": frozenset({"a", "b"}), "Gemm": frozenset({"c"})}


def test_everything_in_integers_where_that_is_fastest(decide: Callable[..., gate.GateResult]) -> None:
    result = decide(GROUPS, lambda keep: 2.0 if keep is None else 1.0 + len(keep))
    assert not result.all_float
    assert result.keep_float == frozenset()
    assert result.ratio == 0.5


def test_a_kind_that_is_slower_in_integers_goes_back_to_float(decide: Callable[..., gate.GateResult]) -> None:
    result = decide(
        GROUPS, lambda keep: 2.0 if keep is None else (1.0 if "c" in keep else 1.5) + ("a" in keep)
    )
    assert result.keep_float == {"c"}
    assert not result.all_float
    assert [t.adopted for t in result.trials] == [False, True, True]


def test_the_model_stays_float_where_integers_never_pay(decide: Callable[..., gate.GateResult]) -> None:
    result = decide(GROUPS, lambda keep: 1.0 if keep is None else 1.2)
    assert result.all_float
    assert result.ratio == 1.0


def test_a_gain_within_the_noise_is_no_gain(decide: Callable[..., gate.GateResult]) -> None:
    assert decide(GROUPS, lambda keep: 1.0 if keep is None else 0.99).all_float


def test_no_integer_layer_at_all(decide: Callable[..., gate.GateResult]) -> None:
    assert decide({}, lambda keep: 1.0).all_float


def test_kinds_group_layers_of_one_form() -> None:
    groups = gate.kinds(plan_selection(build(CNN), PROFILE, "onnxruntime", {}))
    assert groups == {
        "Conv 4x3x3x3": frozenset({"c1"}),
        "Conv 4x4x3x3": frozenset({"c2"}),
        "Gemm 4x5": frozenset({"g"}),
    }
    pointwise = gate.kinds(plan_selection(build(CONCAT), PROFILE, "onnxruntime", {}))
    assert pointwise["1x1 Conv 2x4x1x1"] == {"a", "b"}


def heavy(repeats: int) -> ir.Model:
    layers = "\n".join(f"h{k + 1} = Sin(h{k})" for k in range(repeats))
    header = '<ir_version: 8, opset_import: ["" : 17]>'
    text = f"{header} g (float[64,256] x) => (float[64,256] h{repeats}) {{ h0 = Cos(x) {layers} }}"
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("reopened", [False, True])
def test_paired_timing_sees_which_model_does_more_work(reopened: bool) -> None:
    import numpy as np

    feeds: Sequence[dict[str, np.ndarray]] = [{"x": np.zeros((64, 256), np.float32)}]
    light, weighty = heavy(1), heavy(16)
    if reopened:
        found = time_reopened(
            lambda: open_session(light),
            lambda: open_session(weighty),
            feeds,
            sessions=2,
            rounds=3,
            round_s=ROUND_S,
        )
    else:
        found = time_paired(open_session(light), open_session(weighty), feeds, rounds=5)
    # One eighth of the work; a loaded machine may blur it, but not turn it around.
    assert found.ratio < 0.8
    assert found.rounds == (6 if reopened else 5)
