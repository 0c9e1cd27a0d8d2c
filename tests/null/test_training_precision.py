"""Which tensors get fewer bits, and the grids that training starts from."""

import numpy as np
import pytest

from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan, WeightQuant
from bitwright.compiler.training.precision import (
    levels,
    narrow_tensors,
    narrowed_layers,
    with_activation_bits,
)
from bitwright.compiler.training.request import Precision


def layer(name, reads):
    return NodeDecision(name, "Conv", "int8", "anchor", "", inputs=(reads,), output="int", weight=f"w{name}")


def plan_of(**ties):
    """x -> a -> b -> (pool, flat) -> c -> d; the addition reads what a and b write."""
    plan = Plan("t", "artifact")
    for name, reads in (("a", "x"), ("b", "ta"), ("c", "tb"), ("d", "flat")):
        plan.nodes[name] = layer(name, reads)
        plan.weights[f"w{name}"] = WeightQuant(f"w{name}", "int8", 0, np.ones(2, np.float32))
    plan.nodes["s"] = NodeDecision("s", "Add", "int8", "follower", "", inputs=("ta", "tc"), output="int")
    for name in ("x", "ta", "tb", "tc", "ts", "pool", "flat"):
        plan.activations[name] = ActivationQuant(name, "uint8", 0.1, 0, 0.0, 25.5, tie=ties.get(name, ""))
    return plan


WRITERS = {"ta": "Conv", "tb": "Conv", "tc": "Conv", "ts": "Add", "pool": "AveragePool"}


def test_inner_layers_are_narrowed_and_all_if_asked_for():
    assert [d.node for d in narrowed_layers(plan_of(), everywhere=False)] == ["b", "c"]
    assert [d.node for d in narrowed_layers(plan_of(), everywhere=True)] == ["a", "b", "c", "d"]


def test_what_narrowed_layers_read_gets_fewer_bits():
    assert narrow_tensors(plan_of(), Precision(2, 4), WRITERS) == {"ta", "tb"}
    assert narrow_tensors(plan_of(), Precision(2, None), WRITERS) == frozenset()
    every = Precision(2, 4, everywhere=True)
    assert narrow_tensors(plan_of(), every, WRITERS) == {"x", "ta", "tb", "flat"}


def test_what_shares_a_scale_goes_along_unless_pooling_writes_it():
    every = Precision(2, 4, everywhere=True)
    tied = plan_of(flat="pool", pool="pool")
    assert narrow_tensors(tied, every, WRITERS) == {"x", "ta", "tb"}
    assert narrow_tensors(tied, every, {**WRITERS, "pool": "Conv"}) == {"x", "ta", "tb", "pool", "flat"}


@pytest.mark.parametrize(
    ("quant", "bits", "low", "high", "expected"),
    [
        (("uint8", 0, 0.0), 4, 0.0, 30.0, (2.0, 0, (0, 15))),
        (("uint8", 100, -5.0), 4, -6.0, 9.0, (1.0, 6, (0, 15))),
        (("int8", -128, 0.0), 2, 0.0, 3.0, (1.0, -128, (-128, -125))),
        (("int8", 0, -5.0), 4, -7.0, 3.0, (1.0, 0, (-8, 7))),
        (("int8", 0, 0.0), 4, 0.0, 30.0, (2.0, 0, (0, 15))),
        (("uint8", 0, 0.0), 1, 0.0, 2.0, (2.0, 0, (0, 1))),
        (("int8", 0, -5.0), 1, -2.0, 1.0, (2.0, 0, (-1, 1))),
        (("uint8", 0, 0.0), 4, 0.0, 0.0, (1.0, 0, (0, 15))),
    ],
)
def test_grids_cover_the_range(quant, bits, low, high, expected):
    dtype, zero, calibrated = quant
    plan = Plan("t", "artifact", activations={"x": ActivationQuant("x", dtype, 0.1, zero, calibrated, 9.0)})
    tensors = frozenset(["x"])
    plan = with_activation_bits(plan, tensors, bits, {"x": (low, high)})
    found = plan.activations["x"]
    assert (found.scale, found.zero_point, levels(plan, tensors, bits)["x"]) == expected
