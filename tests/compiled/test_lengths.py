"""Functions for sequences of any length: what was lowered at a few lengths serves all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tvm
from encoder_model import MODEL, POSITIONS, text_of, texts, write_encoder
from lower_helpers import host_target
from test_c_runtime import build, check_outputs
from test_c_runtime import run as run_program_alone
from tvm.runtime.vm import VirtualMachine

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.lower.compile import compile_module
from bitwright.compiler.lower.dynamic.lengths import AnyLength, add_any_length
from bitwright.compiler.lower.dynamic.sizes import Polynomial, Unlike, at, fitted, unified
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.program.extract import extract_program
from bitwright.passes.normalize import specialize
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

LENGTHS = (13, 17, 19, 23)
# One position; less, as much and more than a vector of any target, a tile, a block of rows; several of each.
TRIED = (1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 130)


def test_sizes_are_polynomials_of_the_length() -> None:
    assert fitted(LENGTHS, [12 * n * n + n for n in LENGTHS]) == Polynomial((0, 1, 12))
    assert fitted(LENGTHS, [7] * 4) == 7
    assert fitted(LENGTHS, [n // 2 for n in LENGTHS]) is None
    assert fitted(LENGTHS, [n**3 for n in LENGTHS]) is None
    size = Polynomial((3, 2, 0)) * Polynomial((0, 5, 0))
    assert [at(size, n) for n in (1, 10)] == [25, 1150]
    assert Polynomial((3, 2, 0)) + 4 == Polynomial((7, 2, 0))
    with pytest.raises(Unlike, match="no polynomial"):
        unified(LENGTHS, [(1, n // 4) for n in LENGTHS])
    with pytest.raises(Unlike, match="differ from length to length"):
        unified(LENGTHS, [(0.5,), (0.5,), (0.5,), (0.25,)])


# Everything in float: its kernels are judged by ONNX Runtime, which computes the same in float32.
ISLANDS = {
    "attention": """
        g (float[1, T, 48] q, float[1, T, 48] k, float[1, T, 48] v, float[1, 1, 1, T] m) => (float[1, T, 48] y)
        <int64[4] s = {1, -1, 3, 16}, int64[3] t = {1, -1, 48}, float d = {4}>
        { q1 = Reshape(q, s) q2 = Transpose<perm=[0,2,1,3]>(q1) k1 = Reshape(k, s) k2 = Transpose<perm=[0,2,3,1]>(k1)
          v1 = Reshape(v, s) v2 = Transpose<perm=[0,2,1,3]>(v1) a = MatMul(q2, k2) b = Div(a, d) c = Add(b, m)
          e = Softmax<axis=-1>(c) f = MatMul(e, v2) h = Transpose<perm=[0,2,1,3]>(f) y = Reshape(h, t) }""",
    "rows of any length": """g (float[3, T] x, float[T] w) => (float[3, T] y)
        { s = Softmax<axis=-1>(x) m = ReduceMean<axes=[-1]>(x) n = ReduceMax<axes=[-1]>(x)
          a = Sub(x, m) b = Tanh(a) c = Mul(b, s) d = Add(c, n) y = Mul(d, w) }""",
    "rows in any number": """g (float[2, T, 20] x, float[20] w) => (float[2, T, 20] y)
        { s = Sigmoid(x) m = ReduceMean<axes=[-1]>(x) a = Sub(x, m) b = Mul(a, s) y = Add(b, w) }""",
    "a product with a weight": """g (float[1, T, 20] x) => (float[1, T, 33] y)
        { m = MatMul(x, w) a = Add(m, c) y = Relu(a) }""",
    "products of sequences": """g (float[2, T, 24] a, float[2, 24, T] b) => (float[2, T, T] y, float[2, 24, 24] z)
        { y = MatMul(a, b) z = MatMul(b, a) }""",
    "what TVM writes": """g (float[1, T, 8] x, int64[1, T] i) => (float[1, T, 24] y, float[1, 8] z, bool[1, T] b)
        <int64[1] k = {1}, int64 two = {2}>
        { e = Gather(table, i) y = Concat<axis=-1>(x, e) z = ReduceSum<keepdims=0>(x, k) b = Less(i, two) }""",
}
WEIGHTS = {"w": (20, 33), "c": (33,), "table": (5, 16)}


def island(name: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {ISLANDS[name]}')
    fed = {v.name for v in proto.graph.input} | {o for n in proto.graph.node for o in n.output}
    used = {i for n in proto.graph.node for i in n.input} - fed
    rng = np.random.default_rng(3)
    for weight, shape in WEIGHTS.items():
        array = rng.normal(size=shape).astype(np.float32)
        if weight in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
    return proto


def programs(proto: onnx.ModelProto, lengths: tuple[int, ...]):  # type: ignore[no-untyped-def]
    for length in lengths:
        model = ir.from_proto(proto)
        specialize(model, {"T": length})
        yield extract_program(model)


def feeds_of(proto: onnx.ModelProto, length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(length)
    found = []
    for value in proto.graph.input:
        shape = [d.dim_value or length for d in value.type.tensor_type.shape.dim]
        whole = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        found.append(rng.integers(0, 5, shape) if whole else rng.normal(size=shape).astype(np.float32))
    return found


@pytest.mark.parametrize("name", ISLANDS)
def test_float_code_of_any_length_computes_what_onnx_runtime_does(name: str) -> None:
    proto, profile = island(name), load_profile("host")
    wanted = AnyLength("main", LENGTHS, programs(proto, LENGTHS), bounded=False)
    backend = backend_for(profile.family)
    target = backend.tvm_target(profile)
    module, table = add_any_length(tvm.IRModule(), wanted, profile, backend.dot_kernel, target)
    assert not table
    machine = VirtualMachine(compile_module(module, target), tvm.cpu())
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for length in TRIED:
        feeds = feeds_of(proto, length)
        expected = session.run(None, dict(zip([v.name for v in proto.graph.input], feeds, strict=True)))
        found = machine["main"](*map(tvm.runtime.tensor, feeds))
        found = [found] if len(expected) == 1 else list(found)
        for one, other in zip(found, expected, strict=True):
            # Sums of at most 130 products in another order, and functions a few roundings off.
            np.testing.assert_allclose(one.numpy(), other, rtol=3e-5, atol=3e-5, err_msg=f"{length}")


def test_products_and_passes_over_rows_have_kernels_of_their_own() -> None:
    profile = load_profile("host")
    backend = backend_for(profile.family)
    wanted = AnyLength("main", LENGTHS, programs(island("attention"), LENGTHS), bounded=False)
    module, _ = add_any_length(tvm.IRModule(), wanted, profile, backend.dot_kernel, host_target())
    names = sorted(v.name_hint for v, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    assert names == ["float_matmul", "float_matmul1", "float_rows"]


def options(model: Path, out: Path, **changes: object) -> Options:
    plain = {"target": "host", "data": texts(), "dims": {"N": 1}, "dynamic": "T", "golden": 1}
    return Options(model=model, output=out, **{**plain, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("lengths")
    model = write_encoder(folder / "encoder.onnx")
    made = compile_model(options(model, folder / "out", longest=POSITIONS, buckets={"T": (12,)}))
    assert made is not None
    return made


def test_integer_kernels_equal_the_reference_at_every_length(bundle: Bundle) -> None:
    result = verify(bundle.path)
    assert result.passed and result.executed == "native"
    assert bundle.rules is not None
    served = {g.inputs["ids"].shape[1]: bundle.rules.dispatch(g.inputs).function for g in bundle.golden()}
    assert {n for n, f in served.items() if bundle.rules.is_dynamic(f)} == {1, 7, 16, 33, 128}
    assert {n for n, f in served.items() if not bundle.rules.is_dynamic(f)} == {12}


@pytest.mark.parametrize("length", [1, 2, 5, 12, 13, 31, 64, 99, POSITIONS])
def test_any_length_is_computed(bundle: Bundle, length: int) -> None:
    for hidden in (0, length // 3):
        feeds = text_of(length, 7, hidden)
        artifact, reference = bundle.run(feeds), bundle.run(feeds, "ort")
        for name, expected in reference.items():
            # As in test_buckets: a value at a tie of a quantizer behind float code moves by one step.
            np.testing.assert_allclose(artifact[name], expected, atol=np.ptp(expected) / 100)


def test_the_function_for_just_one_length_gives_the_same(bundle: Bundle) -> None:
    """Rows of integer kernels do not depend on the blocks that they are computed in."""
    assert bundle.rules is not None
    feeds = text_of(12, 3)
    exact = bundle.run(feeds)["tokens"]
    free = bundle.run(text_of(12, 3) | {}, "ort")["tokens"]
    np.testing.assert_allclose(exact, free, atol=np.ptp(free) / 100)


def test_longer_sequences_than_the_longest_are_refused(bundle: Bundle) -> None:
    with pytest.raises(DataError, match=f"T={POSITIONS + 1} is larger than {POSITIONS}, the largest"):
        bundle.run(text_of(POSITIONS + 1, 1))


def test_memory_is_stated_for_the_longest_sequence(bundle: Bundle) -> None:
    functions = {f["name"]: f for f in bundle.report["deployment"]["functions"]}
    any_length = functions["main_1"]
    assert any_length["sizes"]["T"] == POSITIONS
    scores = 3 * POSITIONS * POSITIONS * 4
    assert scores < any_length["memory"]["live_bytes"] <= any_length["memory"]["peak_bytes"] < 8 * scores


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_the_c_runtime_follows_the_same_rules(bundle: Bundle, tmp_path: Path) -> None:
    lib = bundle.path / "lib"
    program = build(lib, tmp_path / "example", lib / "example.cc")
    for length in (12, 29):
        feeds = text_of(length, 5)
        for name, array in feeds.items():
            np.save(tmp_path / f"{name}.npy", array)
        printed = run_program_alone(program, lib, tmp_path, tmp_path / "ids.npy", tmp_path / "mask.npy")
        assert f"tokens [1, {length}, 48]" in printed
        check_outputs(tmp_path, bundle, feeds)


def test_what_is_stored_for_every_position_needs_a_longest_sequence(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "encoder.onnx")
    with pytest.raises(UsageError, match="holds values for every position") as caught:
        compile_model(options(model, tmp_path / "out"))
    assert "--dynamic" in caught.value.fix


def test_more_positions_than_the_model_has_are_refused(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "encoder.onnx")
    with pytest.raises(UsageError, match=f"does not compute a sequence of {POSITIONS + 40}") as caught:
        compile_model(options(model, tmp_path / "out", longest=POSITIONS + 40))
    assert caught.value.where == "--dynamic"


MIXING = {
    "a convolution along the sequence": (
        """g (float[1, 8, 4, T] x) => (float[1, 8, 4, T] y) { y = Conv<pads=[1, 1, 1, 1]>(x, w) }""",
        {"w": (8, 8, 3, 3)},
        r"\(QConv\) has no kernel for sequences of any length: it mixes the positions",
    ),
    "a running sum": (
        """g (float[1, 8, T] x) => (float[1, 8, T] y) <int64[1] one = {1}>
        { a = CumSum(x, one) y = Relu(a) }""",
        {},
        r"\(CumSum\) has no kernel for sequences of any length",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_positions_is_refused_by_name(name: str, tmp_path: Path) -> None:
    text, weights, expected = MIXING[name]
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(3)
    for weight, shape in weights.items():
        array = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, weight))
    onnx.save(proto, tmp_path / "m.onnx")
    lead = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim][:-1]
    data = [{"x": rng.normal(size=(*lead, n)).astype(np.float32)} for n in (9, 12, 12, 15)]
    with pytest.raises(UsageError, match=expected) as caught:
        compile_model(options(tmp_path / "m.onnx", tmp_path / "out", data=data, dims={}))
    assert caught.value.where == "--dynamic" and "--bucket" in caught.value.fix


def test_one_dimension_at_a_time_is_free(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "encoder.onnx", MODEL)
    with pytest.raises(UsageError, match="'T' is a length, and 'N' is to have several sizes"):
        compile_model(
            options(model, tmp_path / "out", dims={}, buckets={"N": (1, 2)}, pad={"ids": 0.0, "mask": 0.0})
        )
