"""Profiles of NVIDIA's GPUs: what their numbers say, and which units the planner makes for TensorRT."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx.parser import parse_model

from bitwright.compiler.plan.planner import plan_selection
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile

# Dense int8 and fp16 tera-operations a second of the datasheets.
PEAKS = {
    "nvidia-orin": (85, 42.5),
    "nvidia-a100": (624, 312),
    "nvidia-ada": (660.6, 165.2),
    "nvidia-h100": (1979, 989.5),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_rows_give_the_datasheet_s_peak(name: str) -> None:
    profile = load_profile(name)
    for row, wanted in zip(("mma_s8", "mma_f16"), PEAKS[name], strict=True):
        macs = profile.compute_row(row).macs_per_cycle * profile.cores * profile.clock_hz
        assert 2e-12 * macs == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("name", PEAKS)
def test_the_gpu_section_agrees_with_the_rest(name: str) -> None:
    profile = load_profile(name)
    assert profile.gpu is not None and profile.family == "nvidia_gpu" and profile.codegen.kind == "cuda"
    assert profile.gpu.multiprocessors == profile.cores
    assert profile.gpu.shared_bytes_per_block < profile.gpu.shared_bytes_per_multiprocessor
    assert "gpu" in profile.provenance
    # Symmetric: a padded pixel is the integer 0.
    assert profile.qspace("a8").symmetric and profile.qspace("a8").signed


def test_fp8_is_there_from_ada_on() -> None:
    with_fp8 = {name for name in PEAKS if "fp8" in load_profile(name).runtimes.onnxruntime.formats()}
    rows = {name for name in PEAKS if any(r.name == "mma_e4m3" for r in load_profile(name).compute)}
    assert with_fp8 == rows == {"nvidia-ada", "nvidia-h100"}


HEAD = '<ir_version: 8, opset_import: ["" : 20]> g (float[1,16,8,8] x) => (float[1,16,8,8] y)'
WEIGHTS = "<float[16,16,3,3] w = {" + ",".join(["1"] * 2304) + "}>"
CONV = "Conv<kernel_shape=[3,3], pads=[1,1,1,1]>"


def selected(nodes: str, profile: Profile, formats: FormatChoice = FormatChoice()) -> Selection:  # noqa: B008
    model = ir.from_proto(parse_model(f"{HEAD} {WEIGHTS} {{ {nodes} }}"))
    shapes = {v.name or "": (1, 16, 8, 8) for n in model.graph for v in n.outputs} | {"x": (1, 16, 8, 8)}
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.dtype = ir.Shape((1, 16, 8, 8)), ir.DataType.FLOAT
    return plan_selection(model, profile, "onnxruntime", shapes, formats=formats)


def residuals(found: Selection) -> dict[str, tuple[str | None, ...]]:
    """Return for each Add on integers what it reads as integers."""
    return {
        u.output.name or "": tuple(v.name for v in u.activations)
        for u in found.integer
        if u.head.op_type == "Add"
    }


def test_a_residual_add_reads_the_other_branch() -> None:
    found = selected(
        f"a = {CONV}(x, w) b = {CONV}(a, w) s = Add(b, a) y = {CONV}(s, w)", load_profile("nvidia-a100")
    )
    assert residuals(found) == {"s": ("a",)}
    assert {v.name for v in found.quantized} == {"x", "a", "s"}


def test_of_two_products_the_last_one_takes_the_add_in() -> None:
    found = selected(
        f"a = {CONV}(x, w) b = {CONV}(x, w) s = Add(b, a) y = {CONV}(s, w)", load_profile("nvidia-a100")
    )
    assert residuals(found) == {"s": ("a",)}


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        # An activation stands between: its kernel has ended.
        (
            f"a = {CONV}(x, w) r = Relu(a) s = Add(r, x) y = {CONV}(s, w)",
            "no quantized product writes an operand",
        ),
        # Somebody else needs the product's own result.
        (
            f"a = {CONV}(x, w) t = Tanh(a) s = Add(a, x) u = Add(s, t) y = {CONV}(u, w)",
            "no quantized product writes an operand",
        ),
        # The sum leaves in float: eight bits would gain nothing.
        (f"a = {CONV}(x, w) s = Add(a, x) y = Softmax(s)", "nothing behind it reads integers"),
    ],
)
def test_other_adds_stay_in_float(nodes: str, why: str) -> None:
    found = selected(nodes, load_profile("nvidia-a100"))
    reasons = [found.reasons[u.name] for u in found.units if u.head.op_type == "Add"]
    assert not residuals(found) and any(why in reason for reason in reasons)


def test_a_residual_add_has_the_format_of_its_product() -> None:
    nodes = f"a = {CONV}(x, w) b = {CONV}(a, w) s = Add(b, a) y = {CONV}(s, w)"
    found = selected(nodes, load_profile("nvidia-h100"), FormatChoice(("fp8",)))
    (add,) = [u for u in found.integer if u.head.op_type == "Add"]
    assert add.combo is not None and add.combo.format == "fp8"


def test_fp8_convolutions_need_aligned_channels() -> None:
    model = parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> g (float[1,3,8,8] x) => (float[1,16,8,8] y) '
        f"<float[16,3,1,1] w = {{{','.join(['1'] * 48)}}}> {{ y = Conv(x, w) }}"
    )
    loaded = ir.from_proto(model)
    shapes = {"x": (1, 3, 8, 8), "y": (1, 16, 8, 8)}
    found = plan_selection(
        loaded, load_profile("nvidia-ada"), "onnxruntime", shapes, formats=FormatChoice(("fp8",))
    )
    assert not found.integer and "multiples of 16" in next(iter(found.reasons.values()))


def test_a_product_with_one_row_stays_in_float() -> None:
    for rows, chosen in ((1, 0), (2, 1)):
        model = ir.from_proto(
            parse_model(
                f'<ir_version: 8, opset_import: ["" : 20]> g (float[{rows},8] x) => (float[{rows},4] y) '
                f"<float[8,4] w = {{{','.join(['1'] * 32)}}}> {{ y = MatMul(x, w) }}"
            )
        )
        found = plan_selection(
            model, load_profile("nvidia-orin"), "onnxruntime", {"x": (rows, 8), "y": (rows, 4)}
        )
        assert len(found.integer) == chosen
