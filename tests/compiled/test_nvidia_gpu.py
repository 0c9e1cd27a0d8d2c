"""Artifacts for GPUs: compiled by nvcc, executed as they are on an emulated device, bit for bit like the reference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from bitwright import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.loader import load_profile
from bitwright.targets.nvidia_gpu.execution import EXECUTED, why_not_executable

pytestmark = [
    pytest.mark.skipif(
        shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(),
        reason="nvcc is not installed",
    ),
    pytest.mark.skipif(why_not_executable() is not None, reason=str(why_not_executable())),
]

# A residual block, a depthwise convolution, pooling, and an island that is fused and reduced along rows.
SMALL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,3,9,9] x) => (float[1,10] y) {
  a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
  ar = Relu(a)
  b = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=16>(ar, w1, b1)
  c = Conv<kernel_shape=[1,1]>(b, w2, b2)
  s = Add(c, ar)
  sr = Relu(s)
  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(sr)
  p = GlobalAveragePool(m)
  f = Flatten(p)
  l = Gemm(f, wf, bf)
  y = Softmax(l)
}"""
SHAPES = {
    "w0": (16, 3, 3, 3),
    "b0": (16,),
    "w1": (16, 1, 3, 3),
    "b1": (16,),
    "w2": (16, 16, 1, 1),
    "b2": (16,),
    "wf": (16, 10),
    "bf": (10,),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    proto = parse_model(SMALL)
    for name, shape in SHAPES.items():
        array = (random.standard_normal(shape) * 0.3).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    onnx.save(proto, path)
    return path


def options(model: Path, target: str, output: Path, **changes: object) -> Options:
    random = np.random.default_rng(1)
    data = [{"x": random.standard_normal((1, 3, 9, 9)).astype(np.float32)} for _ in range(8)]
    return Options(model=model, target=target, data=data, output=output, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def a100(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    bundle = compile_model(options(model, "nvidia-a100", tmp_path_factory.mktemp("a100") / "out"))
    assert bundle is not None
    return bundle


def machines(file: Path) -> list[int]:
    """Return the ELF machine of every object that lies inside a file."""
    content, found, at = file.read_bytes(), [], 0
    while (at := content.find(b"\x7fELF", at)) >= 0:
        found.append(int.from_bytes(content[at + 18 : at + 20], "little"))
        at += 1
    return found


EM_CUDA, EM_X86_64, EM_AARCH64 = 190, 62, 183


def test_every_integer_kernel_equals_the_reference(a100: Bundle) -> None:
    found = a100.report["verification"]
    assert found["executed"] == EXECUTED and found["passed"] and not found["kernel_differences"]
    operations = {call.operation for call in read_table(a100)}
    assert {"QConv", "QGemm", "QAdd", "QPool.max", "QPool.average", "Quantize"} <= operations
    assert found["calls"] == 2 * len(read_table(a100))  # on each of the two golden sets


def read_table(bundle: Bundle) -> tuple:
    from bitwright.compiler.lower.kernel_table import load_table

    return load_table((bundle.path / "lib" / "kernels.json").read_text())


def test_the_outputs_of_the_replayed_graph_are_those_of_the_model(a100: Bundle) -> None:
    for golden in a100.golden():
        outputs = a100.run(golden.inputs)
        # The island's exp and sum are float; a probability is off by some roundings of float32.
        assert np.abs(outputs["y"] - golden.outputs["y"]).max() < 1e-6


def test_the_library_holds_machine_code_and_a_captured_graph(a100: Bundle) -> None:
    library = a100.path / "lib" / "model.so"
    assert EM_CUDA in machines(library)
    assert b"vm.builtin.cuda_graph.run_or_capture" in library.read_bytes()


def test_ptxas_says_what_every_kernel_takes(a100: Bundle) -> None:
    kernels = json.loads((a100.path / "lib" / "resources.json").read_text())
    gpu = load_profile("nvidia-a100").gpu
    assert gpu is not None
    symbols = {call.function for call in read_table(a100)}
    assert {f"{symbol}_kernel" for symbol in symbols} <= {k["name"] for k in kernels}
    assert all(0 < k["registers"] <= gpu.registers_per_thread and not k["spill_bytes"] for k in kernels)
    assert any("Registers of a thread" in line for line in verify(a100.path, samples=1).lines())


def test_both_ends_of_the_hardware_s_freedom_give_the_same(
    a100: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asynchronous copies as early as possible, and threads in falling order."""
    monkeypatch.setenv("BITWRIGHT_EMULATION_POLICY", "3")
    assert verify(a100.path, samples=1).passed


def test_a_wrong_kernel_is_found(a100: Bundle, tmp_path: Path) -> None:
    """A bundle whose kernels are another model's: the emulation executes what it is given."""
    from bitwright.targets.nvidia_gpu.emulated_kernels import build_kernels

    broken = tmp_path / "broken"
    shutil.copytree(a100.path, broken)
    source = (broken / "lib" / "kernels.cu").read_text()
    assert source.count("bw_fma(") > 1  # its definition, and the residual Add
    head, _, tail = source.partition('extern "C" __global__')
    build_kernels(
        head + 'extern "C" __global__' + tail.replace("bw_fma(", "0.5f + bw_fma("), broken / "kernels.so"
    )
    (broken / "kernels.so").replace(broken / "lib" / "emulation" / "kernels.so")
    from bitwright.compiler.bundle.verify import verify_folder

    found = verify_folder(broken, load_profile("nvidia-a100"), samples=1)
    assert {d.step for d in found.kernel_differences} and not found.passed


def test_jetson_has_an_arm_host_and_is_executed_through_this_machine_s(model: Path, tmp_path: Path) -> None:
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.importorskip("ziglang", reason="no linker for aarch64")
    bundle = compile_model(options(model, "nvidia-orin", tmp_path / "out", golden=1))
    assert bundle is not None
    lib = bundle.path / "lib"
    assert machines(lib / "model.so")[0] == EM_AARCH64 and EM_CUDA in machines(lib / "model.so")
    assert machines(lib / "emulation" / "model.so")[0] == EM_X86_64
    if (lib / "runner").exists():  # TVM's runtime for aarch64 has to be downloaded
        assert bundle.report["verification"]["executed"] == EXECUTED
        assert bundle.report["verification"]["passed"]


@pytest.mark.parametrize(
    ("change", "where"), [({"static": "net"}, "--static"), ({"dynamic": "N"}, "--dynamic")]
)
def test_what_only_processors_have_is_refused(
    model: Path, tmp_path: Path, change: dict[str, str], where: str
) -> None:
    with pytest.raises(UsageError, match="kernels of fixed shapes") as refusal:
        compile_model(options(model, "nvidia-a100", tmp_path / "out", **change))
    assert refusal.value.where == where


def test_steps_that_are_no_products_equal_the_interpreter(tmp_path: Path) -> None:
    """Random pooling, elementwise, look-up, moving and quantizing steps, in any storage order, in one library."""
    from random_steps import KINDS, differences, random_program

    from bitwright.compiler.interpret.run import run_program

    program, feeds, labels = random_program(11, range(3 * len(KINDS)))
    outputs = on_emulated_device(program, feeds, tmp_path)
    wrong = differences(labels, outputs, run_program(program, feeds))
    assert not wrong, "\n".join(wrong)


def test_pooling_over_large_windows_is_shared_by_a_warp(tmp_path: Path) -> None:
    from bitwright.compiler.interpret.run import run_program
    from bitwright.compiler.program.ops import Program, QPool, QuantParams, Tensor

    x, y = QuantParams("int8", 0.05, 0), QuantParams("int8", 0.04, 0)
    tensors = {"x": Tensor("x", (2, 12, 8, 9), "int8", x)}
    steps = []
    for name, kind, kernel, pads, out in (
        ("all", "average", (8, 9), (0, 0, 0, 0), (1, 1)),
        ("padded", "average", (6, 7), (3, 2, 1, 4), (7, 9)),
        ("largest", "max", (5, 7), (2, 3, 2, 3), (8, 9)),
    ):
        steps.append(QPool(name=name, inputs=("x",), outputs=(name,), kind=kind, kernel=kernel, pads=pads))
        tensors[name] = Tensor(name, (2, 12, *out), "int8", x if kind == "max" else y)
    program = Program(("x",), ("all", "padded", "largest"), tuple(steps), tensors)
    feeds = {"x": np.random.default_rng(0).integers(-128, 128, (2, 12, 8, 9)).astype(np.int8)}
    found, expected = on_emulated_device(program, feeds, tmp_path), run_program(program, feeds)
    assert all(np.array_equal(found[name], expected[name]) for name in program.outputs)


def on_emulated_device(program: object, feeds: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    from bitwright.compiler.lower.compile import compile_module, export_objects
    from bitwright.compiler.lower.relax_module import build_functions
    from bitwright.targets.nvidia_gpu import execution
    from bitwright.targets.nvidia_gpu.backend import BACKEND
    from bitwright.targets.toolchain.interface import Interface, Port

    profile = load_profile("nvidia-h100")
    lib, objects = folder / "bundle" / "lib", folder / "objects"
    lib.mkdir(parents=True)
    objects.mkdir()
    with BACKEND.lowering(profile, objects / "device") as device:  # type: ignore[attr-defined]
        lowered = build_functions(
            {"main": program}, profile, None, step_kernel=device.step, reorder=device.reorder
        )
        executable = compile_module(lowered.ir_module, BACKEND.tvm_target(profile), device=device)
        BACKEND.link(export_objects(executable, objects), lib / "model.so", profile)

    def ports(names: tuple[str, ...]) -> tuple[Port, ...]:
        tensors: Callable = program.tensor  # type: ignore[attr-defined]
        return tuple(Port(n, tensors(n).dtype, tensors(n).shape) for n in names)

    Interface(ports(program.inputs), ports(program.outputs), {}).write(lib)  # type: ignore[attr-defined]
    return dict(execution.run(folder / "bundle", feeds, trace=False, library="").outputs)
