"""Functions for any number of elements: kernels equal the interpreter at sizes nothing was compiled for."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm
from attention_model import sample, samples, write_model
from dot_reference import Case, make
from test_c_runtime import build, check_outputs
from test_c_runtime import run as run_program_alone
from tvm import relax
from tvm.runtime.vm import VirtualMachine

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import DataError, ToolchainError, UsageError, VerificationError
from bitwright.compiler.interpret.run import run_step
from bitwright.compiler.lower.compile import compile_module
from bitwright.compiler.lower.dynamic.blocks import BLOCKS, call_costs, dot_blocks
from bitwright.compiler.lower.dynamic.functions import DynamicFunction, make_dynamic
from bitwright.compiler.lower.relax_module import build_functions
from bitwright.compiler.lower.shared_packing import sharing
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

# Every way to cut a batch into blocks of 64, 16, 4 and 1, with and without a block that begins inside another.
COUNTS = (1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130)
CASES = [
    Case("row", (1, 100), (100, 48)),
    Case("row_float", (1, 70), (70, 33), y_dtype="float32", relu=True),
    Case("rows", (1, 5, 64), (64, 32), x_dtype="int8", y_dtype="int8"),
    Case("convolution", (1, 5, 9, 9), (7, 5, 3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
    Case("depthwise", (1, 16, 6, 6), (16, 1, 3, 3), pads=(1, 1, 1, 1), group=16),
    Case("pixel", (1, 64, 1, 1), (24, 64, 1, 1), y_dtype="int8"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_kernel_computes_any_number_of_elements(case: Case) -> None:
    profile = load_profile("host")
    backend = backend_for(profile.family)
    step, program, one = make(case)
    dot_kernel = sharing(backend.dot_kernel, backend)
    blocks = dot_blocks(program, profile, dot_kernel)
    lowered = build_functions({"main": program}, profile, dot_kernel)
    tables = []

    def scheduled(module: tvm.IRModule) -> tvm.IRModule:
        table = lowered.kernel_tables["main"]
        wanted = DynamicFunction("main", frozenset({0}), table, blocks, call_costs(program))
        module, calls = make_dynamic(module, wanted)
        tables.append(calls)
        return module

    machine = VirtualMachine(
        compile_module(lowered.ir_module, backend.tvm_target(profile), scheduled=scheduled), tvm.cpu()
    )
    generator = np.random.default_rng(3)
    info = np.iinfo(one.dtype)
    for count in COUNTS:
        shape = (count * one.shape[0], *one.shape[1:])
        x = generator.integers(info.min, info.max + 1, shape).astype(one.dtype)
        found = machine["main"](tvm.runtime.tensor(x)).numpy()
        rows = [run_step(step, program, (part,))[0] for part in np.split(x, count)]
        np.testing.assert_array_equal(found, np.concatenate(rows), err_msg=f"{count} elements")
    assert [call.step for call in tables[0] if call.step] == [step.name]
    assert all(call.function.endswith("_any") for call in tables[0])


def test_blocks_are_as_large_as_keeps_an_instruction_busy() -> None:
    profile = load_profile("host")
    backend = backend_for(profile.family)
    image = Case("image", (1, 3, 34, 34), (4, 3, 3, 3))
    for case, expected in ((CASES[0], BLOCKS), (CASES[2], BLOCKS), (CASES[3], (16, 4)), (image, ())):
        _, program, _ = make(case)
        call = build_functions({"main": program}, profile, backend.dot_kernel).kernel_tables["main"]
        blocks = dot_blocks(program, profile, backend.dot_kernel)
        assert [larger.elements for larger in blocks(call[-2] if len(call) > 1 else call[0])] == list(
            expected
        )


def test_an_operator_without_a_kernel_is_refused() -> None:
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(
                relax.op.call_dps_packed(
                    "elsewhere", relax.Tuple([x]), out_ty=relax.TensorType((1, 4), "float32")
                )
            )
        builder.emit_func_output(out)
    wanted = DynamicFunction("main", frozenset({0}), (), lambda _: (), lambda _: 1)
    with pytest.raises(ToolchainError, match="call_dps_packed has no kernel that could run for any number"):
        make_dynamic(builder.get(), wanted)


def options(model: Path, out: Path, **changes: object) -> Options:
    plain = {"target": "host", "data": samples(), "dynamic": "N", "golden": 1}
    return Options(model=model, output=out, **{**plain, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("dynamic")
    made = compile_model(
        options(
            write_model(folder / "attention.onnx"),
            folder / "out",
            buckets={"T": (8,), "N": (1, 4)},
            pad={"x": 0.0, "mask": 0.0},
        )
    )
    assert made is not None
    return made


def test_every_size_is_verified_bit_for_bit(bundle: Bundle) -> None:
    result = verify(bundle.path)
    assert result.passed and result.executed == "native"
    assert bundle.rules is not None
    served = {g.inputs["x"].shape[0]: bundle.rules.dispatch(g.inputs).function for g in bundle.golden()}
    assert {n for n, f in served.items() if bundle.rules.is_dynamic(f)} == {2, 3, 7, 17, 33, 100}
    assert {n for n, f in served.items() if not bundle.rules.is_dynamic(f)} == {1, 4}


@pytest.mark.parametrize(("batch", "length"), [(1, 8), (2, 5), (4, 7), (16, 8), (70, 3), (300, 8)])
def test_any_batch_is_computed(bundle: Bundle, batch: int, length: int) -> None:
    feeds = sample(length, 99, batch)
    artifact, reference = bundle.run(feeds), bundle.run(feeds, "ort")
    assert artifact["tokens"].shape == (batch, length, 16)
    for name, expected in reference.items():
        # As in test_buckets: a value at a tie of a quantizer behind float code moves by one step.
        np.testing.assert_allclose(artifact[name], expected, atol=np.ptp(expected) / 100)


def test_an_element_does_not_depend_on_its_place(bundle: Bundle) -> None:
    """The kernel for one element and the blocks for 64 and 16 give the same bits."""
    feeds = sample(8, 7, 97)
    whole = bundle.run(feeds)
    for k in (0, 63, 64, 80, 96):
        one = bundle.run({name: array[k : k + 1] for name, array in feeds.items()})
        for name, array in one.items():
            np.testing.assert_array_equal(whole[name][k : k + 1], array, err_msg=f"{name}, element {k}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
@pytest.mark.parametrize(("batch", "length"), [(1, 8), (4, 6), (5, 6), (67, 8)])
def test_the_c_runtime_follows_the_same_rules(
    bundle: Bundle, tmp_path: Path, batch: int, length: int
) -> None:
    feeds = sample(length, 5, batch)
    for name, array in feeds.items():
        np.save(tmp_path / f"{name}.npy", array)
    lib = bundle.path / "lib"
    program = build(lib, tmp_path / "example", lib / "example.cc")
    printed = run_program_alone(program, lib, tmp_path, tmp_path / "x.npy", tmp_path / "mask.npy")
    assert f"tokens [{batch}, {length}, 16]" in printed
    check_outputs(tmp_path, bundle, feeds)


MIXING = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[N, 16] x) => (float[N, 16] y)
<int64[1] axis = {0}>
{
  h = MatMul (x, w)
  mean = ReduceMean <keepdims = 1> (h, axis)
  centred = Sub (h, mean)
  y = Relu (centred)
}
"""


def written(text: str, path: Path) -> Path:
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, path)
    return path


def rows(shape: Callable[[int], tuple[int, ...]], count: int = 8) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(k).normal(size=shape(k)).astype(np.float32)} for k in range(count)]


FOLDED = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[N, 5, 16] x) => (float[N, 80] y)
<int64[2] rows = {-1, 16}, int64[2] flat = {-1, 80}, int64[3] apart = {-1, 5, 16}>
{
  r = Reshape (x, rows)
  h = MatMul (r, w)
  a = Relu (h)
  b = Reshape (a, apart)
  t = Transpose <perm = [1, 0, 2]> (b)
  s = Softmax <axis = -1> (t)
  u = Transpose <perm = [1, 0, 2]> (s)
  y = Reshape (u, flat)
}
"""


def test_axes_of_the_batch_may_be_folded_and_moved_inside(tmp_path: Path) -> None:
    model = written(FOLDED, tmp_path / "folded.onnx")
    made = compile_model(options(model, tmp_path / "out", data=rows(lambda _: (1, 5, 16))))
    assert made is not None and verify(made.path).passed
    for count in (1, 6, 70):
        feeds = rows(lambda _, n=count: (n, 5, 16), 1)[0]  # type: ignore[misc]
        expected = made.run(feeds, "ort")["y"]
        # The integer product is exact; Softmax is float code of two runtimes.
        np.testing.assert_allclose(made.run(feeds)["y"], expected, atol=1e-6)


PLAIN = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[N, 16] x) => (float[N, 16] y) { y = MatMul (x, w) }
"""


def test_nothing_beyond_the_largest_size_is_verified(tmp_path: Path) -> None:
    model = written(PLAIN, tmp_path / "plain.onnx")
    data = rows(lambda _: (1, 16))
    made = compile_model(options(model, tmp_path / "out", data=data, longest=5, buckets={"N": (1, 2)}))
    assert made is not None and verify(made.path).passed
    assert sorted(g.inputs["x"].shape[0] for g in made.golden()) == [1, 2, 3, 5]
    with pytest.raises(DataError, match="N=6 is larger than 5, the largest that is served"):
        made.run(rows(lambda _: (6, 16), 1)[0])


def test_elements_that_influence_each_other_are_refused_and_the_node_named(tmp_path: Path) -> None:
    model = written(MIXING, tmp_path / "mixing.onnx")
    data = rows(lambda _: (1, 16))
    with pytest.raises(
        VerificationError, match=r"first node that mixes them is '.*' \(ReduceMean\)"
    ) as caught:
        compile_model(options(model, tmp_path / "out", data=data))
    assert caught.value.where == "--dynamic"


TURNED = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[N, 16] x) => (float[16, N] y)
{
  h = MatMul (x, w)
  y = Transpose <perm = [1, 0]> (h)
}
"""


def test_a_batch_is_outermost_in_outputs_too(tmp_path: Path) -> None:
    model = written(TURNED, tmp_path / "turned.onnx")
    with pytest.raises(UsageError, match=r"'N' is not the outermost dimension of 'y' \[16, N\]"):
        compile_model(options(model, tmp_path / "out", data=rows(lambda _: (1, 16))))


def test_an_executor_without_a_runtime_refuses(tmp_path: Path) -> None:
    model = write_model(tmp_path / "attention.onnx")
    with pytest.raises(UsageError, match="no runtime that could choose among shapes") as caught:
        compile_model(options(model, tmp_path / "out", target="cortex-m55", dims={"T": 8}))
    assert caught.value.where == "--dynamic"


def test_the_name_must_be_a_dynamic_dimension(tmp_path: Path) -> None:
    model = write_model(tmp_path / "attention.onnx")
    with pytest.raises(UsageError, match="no dynamic dimension 'M'"):
        compile_model(options(model, tmp_path / "out", dynamic="M"))
