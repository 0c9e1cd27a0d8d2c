"""Which steps are the same work for a kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.compiler.program.ops import Program, QConv, QGemm, QuantParams, Tensor
from bitwright.compiler.program.workload import workload_key, workloads_of

QUANT = QuantParams("uint8", 0.5, 3)


def gemm(name: str = "g", rows: int = 4, seed: int = 0, **others) -> tuple[QGemm, Program]:
    weight = np.random.default_rng(seed).integers(-127, 127, (8, 16), np.int8)
    step = QGemm(
        name=name,
        inputs=("x",),
        outputs=("y",),
        weight=weight,
        weight_scale=np.ones(16, np.float32),
        **others,
    )
    tensors = {
        "x": Tensor("x", (rows, 8), "uint8", QUANT),
        "y": Tensor("y", (rows, 16), "uint8", replace(QUANT, zero_point=seed)),
    }
    return step, Program(("x",), ("y",), (step,), tensors)


def test_weights_scales_zero_points_bounds_and_names_do_not_count():
    one, other = gemm("g", seed=0), gemm("another", seed=9, lower=7, upper=99)
    assert workload_key(*one) == workload_key(*other)


def test_shapes_types_and_what_is_fused_count():
    float_out = gemm(relu=True)
    float_out[1].tensors["y"] = Tensor("y", (4, 16), "float32")
    keys = {
        workload_key(*case)
        for case in (gemm(), gemm(rows=5), gemm(relu=True), gemm(bias=np.zeros(16, np.int32)), float_out)
    }
    assert len(keys) == 5


def test_strides_pads_dilations_and_groups_count():
    def conv(**others) -> str:
        step = QConv(
            name="c",
            inputs=("x",),
            outputs=("y",),
            weight=np.zeros((4, 4, 3, 3), np.int8),
            weight_scale=np.ones(4, np.float32),
            **others,
        )
        tensors = {name: Tensor(name, (1, 4, 9, 9), "uint8", QUANT) for name in "xy"}
        return workload_key(step, Program(("x",), ("y",), (step,), tensors))

    changed = ({"strides": (1, 2)}, {"pads": (1, 1, 1, 1)}, {"dilations": (2, 1)}, {"group": 2}, {})
    assert len({conv(**others) for others in changed}) == 5


def test_equal_work_of_several_programs_is_one_workload():
    (first, one), (second, other) = gemm("a"), gemm("b", rows=5)
    found = workloads_of([one, other, one])
    assert [w.steps for w in found] == [("a", "a"), ("b",)]
    assert found[0].calls == 2
    assert found[0].label == "Gemm 4x8 * 8x16 -> 4x16"
    assert {first.name, second.name} == {"a", "b"}
