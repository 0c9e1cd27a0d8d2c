"""Half precision in artifacts: what is stored in it, what is computed in it, and how far that is off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tvm
from encoder_model import text_of, texts, write_encoder
from lower_helpers import host_target, run

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.lower.compile import compile_float, compile_module, optimize
from bitwright.compiler.lower.dynamic.lengths import AnyLength, add_any_length
from bitwright.compiler.lower.float.matmul import HALF_SUMS
from bitwright.compiler.lower.float.storage import storage_of
from bitwright.compiler.lower.float.vectors import vector_unit
from bitwright.compiler.lower.island import import_model
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.program.extract import extract_program
from bitwright.passes.normalize import specialize
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

HALF, SINGLE = 2.0**-11, 2.0**-24
Target = dict[str, str]


FLAGS = {"haswell": "f16c", "skylake-avx512": "avx512f", "sapphirerapids": "avx512_fp16"}


def runs_here(mcpu: str) -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and f" {FLAGS[mcpu]} " in f" {info.read_text().replace(chr(10), ' ')} "


CPUS = [
    pytest.param(mcpu, marks=pytest.mark.skipif(not runs_here(mcpu), reason=f"no {mcpu} or newer"))
    for mcpu in FLAGS
]


def onnx_model(text: str, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def test_only_what_half_precision_holds_exactly_is_stored_in_it() -> None:
    half = np.array([1.5, -(2.0**-24), 65504, 0], np.float32)
    assert storage_of(half) == "float16"
    for value in (65520.0, 1e6, 0.1, 2.0**-25):
        assert storage_of(np.append(half, np.float32(value))) == "float32"


# left, right, right is stored transposed
PRODUCTS = [
    ((1, 40), (40, 70), False),
    ((7, 33), (33, 5), False),
    ((50, 200), (200, 96), False),
    ((2, 3, 20, 16), (2, 3, 16, 32), False),
    ((2, 3, 20, 15), (2, 3, 21, 15), True),
]


@pytest.mark.parametrize("constant", [False, True], ids=["variable", "constant"])
@pytest.mark.parametrize("mcpu", CPUS)
def test_products_lie_within_the_rounding_of_their_sums(mcpu: str, constant: bool) -> None:
    rng = np.random.default_rng(0)
    target = {"kind": "llvm", "mcpu": mcpu}
    computes_half = vector_unit(tvm.target.Target(target)).half_lanes > 0
    for left, right, transposed in PRODUCTS:
        a, b = (rng.normal(size=shape).astype(np.float16) for shape in (left, right))
        turned = np.swapaxes(b, -1, -2) if transposed else b
        exact = a.astype(np.float64) @ turned.astype(np.float64)
        perm = [*range(len(right) - 2), len(right) - 1, len(right) - 2]
        body = f"t = Transpose<perm={perm}>(b) y = MatMul(a, t)" if transposed else "y = MatMul(a, b)"
        shapes = [f"float16[{','.join(map(str, shape))}]" for shape in (left, right, exact.shape)]
        fed = f"{shapes[0]} a" if constant else f"{shapes[0]} a, {shapes[1]} b"
        model = onnx_model(f"g ({fed}) => ({shapes[2]} y) {{ {body} }}", **({"b": b} if constant else {}))
        (found,), _ = run(compile_float(model, target), [a] if constant else [a, b])
        assert found.dtype == np.float16
        magnitudes = np.abs(a).astype(np.float64) @ np.abs(turned).astype(np.float64)
        # Sums in half precision are of at most HALF_SUMS products; they are added in float32; the result is rounded.
        of_sums = (HALF_SUMS + 1) * HALF if computes_half else 0.0
        bound = (of_sums + (left[-1] + 2) * SINGLE) * magnitudes + 1.01 * HALF * np.abs(exact) + 2.0**-24
        assert np.all(np.abs(found - exact) <= bound), (left, right)


def test_the_newest_processors_multiply_halves() -> None:
    units = {
        mcpu: vector_unit(tvm.target.Target({"kind": "llvm", "mcpu": mcpu}))
        for mcpu in ("x86-64", "haswell", "skylake-avx512", "sapphirerapids")
    }
    assert [(u.widens, u.half_lanes) for u in units.values()] == [
        (False, 0),
        (True, 0),
        (True, 0),
        (True, 32),
    ]
    arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
    cores = [
        vector_unit(tvm.target.Target({**arm, "mcpu": m}))
        for m in ("cortex-a53", "cortex-a76", "neoverse-n2")
    ]
    assert [(u.widens, u.half_lanes) for u in cores] == [(True, 0), (True, 8), (True, 8)]


ISLANDS = {
    "rows": """g ({t}[3, 37] x, {t}[37] w) => ({t}[3, 37] y)
        { s = Softmax<axis=-1>(x) m = ReduceMean<axes=[-1]>(x) a = Sub(x, m) b = Mul(a, s) y = Add(b, w) }""",
    "images": """g ({t}[1, 8, 17, 17] x) => ({t}[1, 24, 8, 8] y)
        { c = Conv<pads=[1,1,1,1]>(x, v) d = Relu(c) e = Conv<group=24,pads=[1,1,1,1]>(d, u) f = Add(e, d)
          y = MaxPool<kernel_shape=[2,2],strides=[2,2]>(f) }""",
    "signals": """g ({t}[1, 8, 40] x) => ({t}[1, 12, 40] y) { c = Conv<pads=[1,1]>(x, s) y = Relu(c) }""",
}
WEIGHTS = {"rows": {}, "images": {"v": (24, 8, 3, 3), "u": (24, 1, 3, 3)}, "signals": {"s": (12, 8, 3)}}


@pytest.mark.parametrize("mcpu", CPUS)
@pytest.mark.parametrize("name", ISLANDS)
def test_rows_and_images_are_rounded_where_they_are_stored(name: str, mcpu: str) -> None:
    rng = np.random.default_rng(1)
    weights = {w: (rng.normal(size=shape) / 4).astype(np.float16) for w, shape in WEIGHTS[name].items()}
    half = onnx_model(ISLANDS[name].replace("{t}", "float16"), **weights)
    single = onnx_model(
        ISLANDS[name].replace("{t}", "float"), **{w: a.astype(np.float32) for w, a in weights.items()}
    )
    feeds = [rng.normal(size=[int(d) for d in v.shape.numpy()]).astype(np.float16) for v in half.graph.inputs]
    session = onnxruntime.InferenceSession(
        ir.to_proto(single).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [v.name for v in single.graph.inputs]
    (expected,) = session.run(None, {n: f.astype(np.float32) for n, f in zip(names, feeds, strict=True)})
    (found,), _ = run(compile_float(half, {"kind": "llvm", "mcpu": mcpu}), feeds)
    assert found.dtype == np.float16
    # Up to three tensors are stored on the way; nine products of a depthwise sum pass on what the first rounded.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * HALF * np.abs(expected).max())


def test_float_kernels_read_half_precision_themselves() -> None:
    weights = {w: np.ones(shape, np.float16) for w, shape in WEIGHTS["images"].items()}
    model = onnx_model(ISLANDS["images"].replace("{t}", "float16"), **weights)
    module = optimize(import_model(model, "m"), tvm.target.Target({"kind": "llvm", "mcpu": "haswell"}))
    names = {v.name_hint for v, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert {n for n in names if not n.startswith("transpose")} == {
        "float_convolution",
        "float_depthwise",
        "float_pool",
    }


def stored_types(model: ir.Model) -> list[str]:
    """Return the types of the constants that kernels read."""
    module = optimize(import_model(model, "m"), tvm.target.Target({"kind": "llvm", "mcpu": "haswell"}))
    bindings = [b for block in module["main"].body.blocks for b in block.bindings]
    calls = [b.value for b in bindings if isinstance(b.value, tvm.ir.Call) and len(b.value.args) > 1]
    operands = [a for call in calls if hasattr(call.args[1], "fields") for a in call.args[1].fields]
    types = [str(a.ty.dtype) for a in operands if isinstance(a, tvm.ir.GenericConst)]
    return [dtype for dtype in types if dtype.startswith("float")]


LOOKED_UP = "g (int64[1, 9] i) => (float[1, 9, 64] y) { y = Gather(w, i) }"
MULTIPLIED = "g (float[9, 100] x) => (float[9, 64] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize("text", [LOOKED_UP, MULTIPLIED], ids=["table", "product"])
def test_float32_weights_that_half_precision_holds_are_stored_in_it(text: str) -> None:
    half = np.random.default_rng(2).normal(size=(100, 64)).astype(np.float16).astype(np.float32)
    single = half + np.float32(2.0**-20)
    assert stored_types(onnx_model(text, w=half)) == ["float16"]
    assert stored_types(onnx_model(text, w=single)) == ["float32"]
    model = onnx_model(text, w=half)
    if text == LOOKED_UP:
        index = np.array([[0, 5, 99, 1, 2, 3, 50, 50, 7]])
        (found,), _ = run(compile_float(model, host_target()), [index])
        np.testing.assert_array_equal(found, half[index])
        return
    x = np.random.default_rng(3).normal(size=(9, 100)).astype(np.float32)
    (found,), _ = run(compile_float(model, host_target()), [x])
    exact = x.astype(np.float64) @ half
    assert np.all(np.abs(found - exact) <= 102 * SINGLE * (np.abs(x).astype(np.float64) @ np.abs(half)))


def test_attention_of_any_length_in_half_precision() -> None:
    text = """g (float16[1, T, 48] q, float16[1, T, 48] k, float16[1, T, 48] v) => (float16[1, T, 48] y)
        <int64[4] s = {1, -1, 3, 16}, int64[3] t = {1, -1, 48}>
        { q1 = Reshape(q, s) q2 = Transpose<perm=[0,2,1,3]>(q1) k1 = Reshape(k, s) k2 = Transpose<perm=[0,2,3,1]>(k1)
          v1 = Reshape(v, s) v2 = Transpose<perm=[0,2,1,3]>(v1) a = MatMul(q2, k2) e = Softmax<axis=-1>(a)
          f = MatMul(e, v2) h = Transpose<perm=[0,2,1,3]>(f) y = Reshape(h, t) }"""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}')
    lengths = (13, 17, 19, 23)
    programs = []
    for length in lengths:
        model = ir.from_proto(proto)
        specialize(model, {"T": length})
        programs.append(extract_program(model))
    profile = load_profile("host")
    backend = backend_for(profile.family)
    target = backend.tvm_target(profile)
    wanted = AnyLength("main", lengths, programs, bounded=False)
    module, _ = add_any_length(tvm.IRModule(), wanted, profile, backend.dot_kernel, target)
    executable = compile_module(module, target)
    rng = np.random.default_rng(4)
    for length in (1, 5, 16, 33, 70):
        q, k, v = ((rng.normal(size=(1, length, 48)) / 2).astype(np.float16) for _ in range(3))
        (found,), _ = run(executable, [q, k, v])
        heads = [x.astype(np.float64).reshape(length, 3, 16).transpose(1, 0, 2) for x in (q, k, v)]
        scores = heads[0] @ heads[1].transpose(0, 2, 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ heads[2]
        expected = mixed.transpose(1, 0, 2).reshape(1, length, 48)
        # Scores of at most 8 are off by their rounding, shares by as much relative to themselves.
        np.testing.assert_allclose(found, expected, rtol=0, atol=16 * HALF * np.abs(expected).max())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("half") / "encoder.onnx")


def compiled(model: Path, out: Path, recipe: str) -> Bundle:
    made = compile_model(
        Options(
            model=model,
            output=out,
            target="host",
            data=texts(),
            dims={"N": 1, "T": 12},
            golden=1,
            recipe=recipe,
        )
    )
    assert made is not None
    return made


@pytest.mark.parametrize(("recipe", "bound"), [("fp16", 2e-3), ("fp16-weights", 3e-4)])
def test_recipes_of_half_precision_become_artifacts(
    encoder: Path, tmp_path: Path, recipe: str, bound: float
) -> None:
    """Bounds are a few roundings of 2^-11 of what passes through a dozen layers; weights alone are rounded once."""
    bundle = compiled(encoder, tmp_path / "out", recipe)
    feeds = text_of(12, 3)
    session = onnxruntime.InferenceSession(str(encoder), providers=["CPUExecutionProvider"])
    expected = dict(zip(("tokens", "pooled"), session.run(None, feeds), strict=True))
    for name, found in bundle.run(feeds).items():
        assert found.dtype == np.float32
        error = np.abs(found - expected[name]).max() / np.ptp(expected[name])
        assert 0 < error < bound
    said = str(bundle.report)
    assert ("nodes store half precision" in said) == (recipe == "fp16")
