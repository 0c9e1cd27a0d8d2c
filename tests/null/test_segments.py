"""Splitting a program: who executes what, in which order, and that the parts compute what the whole does."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from bitwright.compiler.bundle.segments import read_kernel_table, read_segments, write_segments
from bitwright.compiler.errors import UsageError
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.lower.job import LoweredSegment
from bitwright.compiler.program.cut import join_models
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import FloatIsland, Program, QLut, QuantParams, Tensor
from bitwright.compiler.program.segments import NotLowered, Split, split_program

Q = QuantParams("uint8", 0.05, 128)
HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
# Stand-ins for what a compiler lacks: the reference evaluator and shape inference know them.
LACKING = ("Erf", "Sin")


def reference(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def why_not(island: FloatIsland) -> str | None:
    """Refuse islands that hold one of the operators."""
    blamed = [n.op_type for n in island.model.graph if n.op_type in LACKING]
    return f"no kernel for {blamed[0]}" if blamed else None


def program(text: str) -> Program:
    return extract_program(
        ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEAD + text)))
    )


def run_split(split: Split, whole: Program, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run the segments one after the other, those of ONNX Runtime as the joined model."""
    values = dict(feeds)
    for segment in split.segments:
        given_to = {name: values[name] for name in segment.program.inputs}
        if segment.executor == "onnxruntime":
            values |= reference(segment.onnx_model(), given_to)
        else:
            values |= run_program(segment.program, given_to, float_runner=reference)
    return {name: values[name] for name in whole.outputs}


def check_partition(split: Split, whole: Program) -> None:
    """Every tensor is written once, after everything it needs; segments pass on exactly what is read later."""
    known = set(whole.inputs)
    written: list[str] = []
    for segment in split.segments:
        part = segment.program
        assert known.issuperset(part.inputs)
        inside = known | set(part.constants)
        for step in part.steps:
            assert inside.issuperset(step.inputs), step.name
            inside.update(step.outputs)
            written += step.outputs
        assert inside.issuperset(part.outputs)
        known.update(part.outputs)
    assert len(written) == len(set(written))
    assert known.issuperset(whole.outputs)
    executors = [segment.executor for segment in split.segments]
    assert all(a != b for a, b in pairwise(executors)), executors


def kinds(split: Split) -> list[list[str]]:
    """Operators by segment, for parts of one island."""
    return [
        [n.op_type for s in seg.program.steps if isinstance(s, FloatIsland) for n in s.model.graph]
        for seg in split.segments
    ]


def test_a_program_that_can_be_lowered_is_one_segment() -> None:
    whole = program("g (float[2, 3] x) => (float[2, 3] y) { a = Relu(x) y = Sqrt(a) }")
    split = split_program(whole, why_not)
    assert split.not_lowered == ()
    (only,) = split.segments
    assert (only.executor, only.program.steps) == ("kernels", whole.steps)
    assert (only.program.inputs, only.program.outputs) == (whole.inputs, whole.outputs)


def test_an_island_is_cut_around_what_is_lacking() -> None:
    whole = program("""g (float[2, 3] x) => (float[2, 3] y, float[2, 3] s) {
        a = Abs(x) [bad] b = Erf(a) c = Abs(b) s = Sqrt(a) y = Add(c, s) }""")
    split = split_program(whole, why_not)
    assert [s.executor for s in split.segments] == ["kernels", "onnxruntime", "kernels"]
    assert kinds(split) == [["Abs", "Sqrt"], ["Erf"], ["Abs", "Add"]]
    (found,) = split.not_lowered
    assert (found.nodes, found.operators, found.reason) == (("bad",), ("Erf",), "no kernel for Erf")
    assert "Erf" in found.sentence()
    check_partition(split, whole)


def test_moves_come_along_with_what_they_feed_or_follow() -> None:
    whole = program("""g (float[2, 3] x) => (float[3, 2] y) {
        t = Transpose <perm = [1, 0]> (x) e = Erf(t) f = Transpose <perm = [1, 0]> (e)
        s = Sin(f) y = Transpose <perm = [1, 0]> (s) }""")
    split = split_program(whole, why_not)
    assert kinds(split) == [["Transpose", "Erf", "Transpose", "Sin", "Transpose"]]
    assert split.segments[0].executor == "onnxruntime"
    assert split.not_lowered[0].operators == ("Erf", "Sin", "Transpose")


def test_two_lacking_parts_of_one_level_share_a_segment_and_their_weights() -> None:
    whole = program("""g (float[2, 3] x) => (float[2, 3] y) <float[1, 3] w = {1.0, 2.0, 3.0}> {
        a = Abs(x) b = Sqrt(a) ea = Erf(a) sb = Sin(b)
        m = Mul(ea, w) n = Mul(sb, w) y = Add(m, n) }""")
    split = split_program(whole, why_not)
    assert [s.executor for s in split.segments] == ["kernels", "onnxruntime", "kernels"]
    assert len(split.not_lowered) == 2
    joined = split.segments[1].onnx_model()
    onnx.checker.check_model(ir.to_proto(joined), full_check=True)
    assert sorted(n.op_type for n in joined.graph) == ["Erf", "Sin"]
    x = np.linspace(-2, 2, 6, dtype="float32").reshape(2, 3)
    expected = run_program(whole, {"x": x}, float_runner=reference)
    np.testing.assert_array_equal(run_split(split, whole, {"x": x})["y"], expected["y"])


def test_joining_keeps_one_copy_of_inputs_constants_and_copied_nodes() -> None:
    text = """g (float[2] x) => (float[2] y) {{
        c = Constant <value = float[2] {{1.0, 2.0}}> () k = Identity(c) y = {}(x, k) }}"""
    models = [ir.from_proto(onnx.parser.parse_model(HEAD + text.format(op))) for op in ("Add", "Mul")]
    for value in models[1].graph.outputs:
        value.name = "z"
    joined = join_models(models)
    proto = ir.to_proto(joined)
    onnx.checker.check_model(proto, full_check=True)
    assert sorted(n.op_type for n in joined.graph) == ["Add", "Constant", "Identity", "Mul"]
    assert [v.name for v in joined.graph.inputs] == ["x"]
    found = reference(joined, {"x": np.array([3, 4], "float32")})
    np.testing.assert_array_equal(found["y"], [4, 6])
    np.testing.assert_array_equal(found["z"], [3, 8])
    assert [v.name for v in models[0].graph.outputs] == ["y"], "the models themselves are unchanged"


def test_integers_cross_between_segments() -> None:
    whole = program("""g (float[4] x) => (float[4] y) <float s = {0.05}, uint8 z = {128}> {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        r = Relu(d) p = QuantizeLinear(r, s, z) f = DequantizeLinear(p, s, z)
        e = Erf(d) y = Add(e, f) }""")
    split = split_program(whole, why_not)
    check_partition(split, whole)
    first, last = split.segments[0].program, split.segments[-1].program
    assert [s.executor for s in split.segments] == ["kernels", "onnxruntime", "kernels"]
    assert all(first.tensor(n) == whole.tensor(n) for n in first.outputs if n in whole.tensors)
    assert last.outputs == ("y",)
    x = np.linspace(-4, 4, 4, dtype="float32")
    np.testing.assert_array_equal(
        run_split(split, whole, {"x": x})["y"], run_program(whole, {"x": x}, float_runner=reference)["y"]
    )


def test_control_flow_takes_its_captured_values_along() -> None:
    whole = program("""g (float[2] x, bool c) => (float[2] y) {
        a = Abs(x) b = Sqrt(a)
        i = If (c) <then_branch = yes () => (float[2] t) { t = Erf(a) },
                    else_branch = no () => (float[2] u) { u = Neg(b) }>
        y = Neg(i) }""")

    def refuses_if(island: FloatIsland) -> str | None:
        return "no control flow" if any(n.op_type == "If" for n in island.model.graph) else None

    split = split_program(whole, refuses_if)
    assert kinds(split) == [["Abs", "Sqrt"], ["If"], ["Neg"]]
    assert set(split.segments[1].program.inputs) == {"a", "b", "c"}
    for flag in (True, False):
        feeds = {"x": np.array([1, 4], "float32"), "c": np.array(flag)}
        expected = run_program(whole, feeds, float_runner=reference)
        np.testing.assert_array_equal(run_split(split, whole, feeds)["y"], expected["y"])


def test_what_cannot_be_cut_goes_whole() -> None:
    """The cut around Abs would pass through what NonZero finds, whose length depends on data."""
    whole = program("""g (float[4] x) => (int64[1] y) <int64[1] zero = {0}, int64[1] one = {1}> {
        n = NonZero(x) f = Cast <to = 1> (n) e = Erf(x) m = Abs(e)
        r = ReduceMax(m) b = Mul(f, r) s = Shape(b) y = Slice(s, zero, one) }""")
    (island,) = whole.steps
    split = split_program(whole, why_not)
    assert [(s.executor, s.program.steps) for s in split.segments] == [("onnxruntime", (island,))]
    assert split.not_lowered[0].reason == "no kernel for Erf"


def test_parts_that_fail_only_together_are_left_to_onnxruntime() -> None:
    whole = program("g (float[2] x) => (float[2] y) { a = Abs(x) b = Neg(a) c = Erf(b) y = Sqrt(c) }")

    def no_pairs(island: FloatIsland) -> str | None:
        found = [n.op_type for n in island.model.graph]
        return "too many" if len(found) > 1 else why_not(island)

    split = split_program(whole, no_pairs)
    check_partition(split, whole)
    assert kinds(split) == [["Abs", "Neg", "Erf"], ["Sqrt"]]
    assert {f.reason for f in split.not_lowered} == {"too many", "no kernel for Erf"}


def test_constant_outputs_are_the_librarys() -> None:
    tensor = Tensor("k", (2,), "uint8", Q)
    whole = Program(
        ("x",), ("k",), (), {"x": Tensor("x", (1,), "float32"), "k": tensor}, {"k": np.ones(2, "uint8")}
    )
    (only,) = split_program(whole, why_not).segments
    assert (only.executor, only.program.outputs, list(only.program.constants)) == ("kernels", ("k",), ["k"])


@st.composite
def random_programs(draw: st.DrawFn) -> tuple[Program, frozenset[str]]:
    """Tables and islands in any order, each reading any earlier tensors; some islands cannot be lowered."""
    names, steps, left = ["x"], [], set()
    tensors = {"x": Tensor("x", (3,), "uint8", Q)}
    for k in range(draw(st.integers(1, 9))):
        reads = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
        output, name = f"t{k}", f"s{k}"
        if draw(st.booleans()):
            table = np.random.default_rng(k).permutation(256).astype("uint8")
            steps.append(QLut(name=name, inputs=(reads[0],), outputs=(output,), table=table, function="any"))
        else:
            body = f"{output} = Max({', '.join(reads)})"
            ports = ", ".join(f"uint8[3] {n}" for n in reads)
            model = onnx.parser.parse_model(
                f"{HEAD} g ({ports}) => (uint8[3] {output}) {{ [{name}] {body} }}"
            )
            island = FloatIsland(
                name=name, inputs=tuple(reads), outputs=(output,), nodes=(name,), model=ir.from_proto(model)
            )
            steps.append(island)
            left |= {name} if draw(st.booleans()) else set()
        tensors[output] = Tensor(output, (3,), "uint8", Q)
        names.append(output)
    outputs = tuple(draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=3, unique=True)))
    return Program(("x",), outputs, tuple(steps), tensors), frozenset(left)


@settings(max_examples=60, deadline=None)
@given(random_programs())
def test_segments_in_order_compute_what_the_program_does(case: tuple[Program, frozenset[str]]) -> None:
    whole, left = case
    split = split_program(whole, lambda island: "left out" if left & set(island.nodes) else None)
    check_partition(split, whole)
    by_executor = {
        executor: {s.name for seg in split.segments if seg.executor == executor for s in seg.program.steps}
        for executor in ("kernels", "onnxruntime")
    }
    nodes = {n for f in split.not_lowered for n in f.nodes}
    assert nodes == left
    assert len(by_executor["kernels"]) + len(by_executor["onnxruntime"]) == len(whole.steps)
    x = np.array([0, 77, 255], "uint8")
    expected = run_program(whole, {"x": x}, float_runner=reference)
    actual = run_split(split, whole, {"x": x})
    for name in whole.outputs:
        np.testing.assert_array_equal(actual[name], expected[name])


@pytest.mark.parametrize("executor", ["kernels", "onnxruntime"])
def test_the_fewest_levels_are_used(executor: str) -> None:
    """Independent chains share the segments: three switches for both, not for each."""
    whole = program("""g (float[2] x) => (float[2] y, float[2] z) {
        a = Abs(x) b = Erf(a) y = Neg(b)
        c = Neg(x) d = Sin(c) z = Abs(d) }""")
    split = split_program(whole, why_not)
    assert len(split.segments) == 3
    assert [s.executor for s in split.segments].count(executor) == (2 if executor == "kernels" else 1)


def test_the_list_of_segments_round_trips(tmp_path: Path) -> None:
    tensor = Tensor("x", (2, 3), "uint8")
    parts = (
        LoweredSegment("kernels", (tensor,), (tensor,), ("a",)),
        LoweredSegment("onnxruntime", (tensor,), (tensor,), ("b",), model=tmp_path / "segment_1.onnx"),
    )
    left = (NotLowered(("b",), ("Erf",), "no kernel for Erf"),)
    assert read_segments(tmp_path) is None
    write_segments(tmp_path, parts, left)
    found = read_segments(tmp_path)
    assert found is not None and found.has_library
    assert [s.path for s in found.segments] == ["segment_0", "segment_1.onnx"]
    assert found.findings() == left
    assert read_kernel_table(tmp_path) == ()
    assert (tmp_path / "segment_0" / "interface.json").exists()


@pytest.mark.parametrize("path", ["../segment_0", "/etc/passwd", "segment_0/../..", "segment_x", ""])
def test_segments_outside_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    write_segments(tmp_path, (LoweredSegment("kernels", (), (), ()),), ())
    file = tmp_path / "segments.json"
    content = json.loads(file.read_text())
    content["segments"][0]["path"] = path
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="list of segments is damaged"):
        read_segments(tmp_path)
