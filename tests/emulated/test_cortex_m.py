"""Static executors on emulated boards: every kernel, every way to compute it, whole models, and the limits."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dot_reference import Case, expected, make

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.errors import (
    DataError,
    InfeasibleBudgetError,
    InternalError,
    ModelError,
    ToolchainError,
)
from bitwright.compiler.interpret.run import run_program as interpret
from bitwright.compiler.lower.job import lower_in_worker
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.program.ops import Program, QAdd, QuantParams, Step, Tensor
from bitwright.targets.backend import Execution, Kernel
from bitwright.targets.cortex_m import emulated
from bitwright.targets.cortex_m.backend import BACKEND
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.interface import Interface, Port

pytestmark = pytest.mark.emulated

TARGETS = ("cortex-m4", "cortex-m7", "cortex-m55", "arm-cortex-a7")
LINUX = "arm-cortex-a7"  # the others are boards
BATCHES, PRODUCTS = 3, 30
DotKernel = Callable[[Step, Program, Profile], Kernel]


@pytest.fixture(params=TARGETS, scope="module")
def profile(request: pytest.FixtureRequest) -> Profile:
    pytest.importorskip("ziglang", reason="needs ziglang, which links for bare metal")
    found = load_profile(request.param)
    reason = BACKEND.why_not_executable(found)
    if reason:
        pytest.skip(reason)
    return found


def random_case(rng: np.random.Generator, number: int) -> Case:
    """A random Gemm or convolution: any group, stride, padding, dilation, and sizes that fill no vector."""
    out = str(rng.choice(["int8", "float32", "uint8"], p=[0.6, 0.3, 0.1]))
    common = {
        "label": f"case{number}",
        "x_dtype": "int8",
        "y_dtype": out,
        "seed": number,
        "bias": bool(rng.integers(2)),
        "relu": bool(rng.integers(2)),
        "extreme": bool(rng.integers(8) == 0),
    }
    if rng.integers(3) == 0:
        m, k, n = (int(v) for v in rng.integers(1, (6, 70, 20)))
        return Case(x=(m, k), w=(k, n), **common)  # type: ignore[arg-type]
    group, kernel = int(rng.choice([1, 1, 2, 5])), tuple(int(v) for v in rng.integers(1, 5, 2))
    depthwise = rng.integers(3) == 0
    inputs = group if depthwise else group * int(rng.integers(1, 8))
    outputs = group if depthwise else group * int(rng.integers(1, 8))
    height, width = (int(v) for v in rng.integers(5, 11, 2))
    return Case(
        x=(int(rng.integers(1, 3)), inputs, height, width),
        w=(outputs, inputs // group, *kernel),
        strides=tuple(int(v) for v in rng.integers(1, 3, 2)),  # type: ignore[arg-type]
        pads=tuple(int(v) for v in rng.integers(0, 3, 4)),  # type: ignore[arg-type]
        dilations=(1, int(rng.integers(1, 3))) if kernel[1] > 1 and width > 8 else (1, 1),
        group=group,
        **common,  # type: ignore[arg-type]
    )


def random_cases(batch: int, target: str) -> list[Case]:
    """Return the products of one program, other ones for every target."""
    rng = np.random.default_rng([batch, TARGETS.index(target)])
    return [random_case(rng, 100 * batch + k) for k in range(PRODUCTS)]


def joined(cases: list[Case]) -> tuple[Program, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return one program of independent steps, its inputs, and its outputs from the formulas."""
    steps, tensors, feeds, outputs = [], {}, {}, {}
    for number, case in enumerate(cases):
        step, program, x = make(case)
        names = {"x": f"x{number}", "y": f"y{number}"}
        steps.append(replace(step, name=f"step{number}", inputs=(names["x"],), outputs=(names["y"],)))
        for old, new in names.items():
            tensors[new] = replace(program.tensor(old), name=new)
        feeds[names["x"]], outputs[names["y"]] = x, expected(step, program, x)
    return Program(tuple(feeds), tuple(outputs), tuple(steps), tensors), feeds, outputs


def run_program(
    program: Program, feeds: dict[str, np.ndarray], profile: Profile, kernel: DotKernel, folder: Path
) -> Execution:
    """Lower, link and run a program on the profile's board."""
    from bitwright.compiler.lower.static_c.lower import plan_static, write_static

    target = BACKEND.tvm_target(profile)
    built, lib = folder / "built", folder / "lib"
    built.mkdir()
    lib.mkdir()
    model = plan_static(program, profile, kernel, target)
    names, _ = write_static(model, target, profile, "A test", built)
    BACKEND.link([built / name for name in names], lib / "model.so", profile)
    inputs, outputs = ([port(program, name) for name in side] for side in (program.inputs, program.outputs))
    Interface(tuple(inputs), tuple(outputs), {}).write(lib)
    return BACKEND.execute(folder, feeds, profile, trace=True)


def executed_on(profile: Profile) -> str:
    return "emulated" if profile.name == LINUX else "emulated (board)"


def port(program: Program, name: str) -> Port:
    tensor: Tensor = program.tensor(name)
    return Port(name, tensor.dtype, tensor.shape)


def assert_equal(execution: Execution, outputs: dict[str, np.ndarray]) -> None:
    for name, values in outputs.items():
        same = np.array_equal(execution.outputs[name].view(np.uint8), values.view(np.uint8))
        assert same, f"{name}: {np.count_nonzero(execution.outputs[name] != values)} of {values.size} differ"


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_products_are_exact(batch: int, profile: Profile, tmp_path: Path) -> None:
    """Thirty random Gemms and convolutions as one program: outputs equal the formulas bit for bit."""
    program, feeds, outputs = joined(random_cases(batch, profile.name))
    execution = run_program(program, feeds, profile, BACKEND.dot_kernel, tmp_path)
    assert execution.executed == executed_on(profile)
    assert_equal(execution, outputs)


CHOSEN = (
    Case("dense", (5, 37), (37, 11), x_dtype="int8", y_dtype="int8"),
    Case("conv", (1, 3, 7, 6), (10, 3, 3, 3), pads=(1, 1, 1, 1), x_dtype="int8", y_dtype="int8"),
    Case("pointwise", (1, 32, 3, 3), (9, 32, 1, 1), strides=(2, 2), x_dtype="int8", y_dtype="float32"),
    Case("depthwise", (1, 9, 6, 5), (9, 1, 3, 3), pads=(1, 0, 1, 2), group=9, x_dtype="int8", y_dtype="int8"),
)


@pytest.mark.slow
def test_every_way_to_compute_a_product_gives_the_same(profile: Profile, tmp_path: Path) -> None:
    cases, choices = [], []
    for case in CHOSEN:
        step, program, _ = make(case)
        for choice in BACKEND.candidates(step, program, profile):
            cases.append(case)
            choices.append(choice)
    assert len(choices) > 3 * 4
    program, feeds, outputs = joined(cases)

    def kernel(step: Step, whole: Program, target: Profile) -> Kernel:
        return BACKEND.dot_kernel(step, whole, target, choices[int(step.name.removeprefix("step"))])

    assert_equal(run_program(program, feeds, profile, kernel, tmp_path), outputs)


def test_an_addition_runs_in_whole_vectors(tmp_path: Path) -> None:
    """On Helium, four elements at once; scalar code takes twenty instructions an element."""
    profile = load_profile("cortex-m55")
    reason = BACKEND.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    shape, params = (1, 16, 32, 32), {"a": (0.02, 3), "b": (0.03, -4), "y": (0.04, 5)}
    tensors = {
        n: Tensor(n, shape, "int8", QuantParams("int8", float(np.float32(s)), z))
        for n, (s, z) in params.items()
    }
    step = QAdd(name="add", inputs=("a", "b"), outputs=("y",), lower=-128, upper=127)
    program = Program(("a", "b"), ("y",), (step,), tensors)
    rng = np.random.default_rng(0)
    feeds = {n: rng.integers(-128, 128, shape).astype(np.int8) for n in "ab"}
    execution = run_program(program, feeds, profile, BACKEND.dot_kernel, tmp_path)
    assert_equal(execution, interpret(program, feeds))
    used = emulated.measure(tmp_path, feeds, profile)
    assert used["instructions"] < 5.5 * np.prod(shape)


MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[1, 3, 10, 9] x, float[1, 8, 5, 5] skip) => (float[1, 4] y, float[1, 8, 5, 5] middle)
{
  a = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w0, b0)
  b = Relu(a)
  c = Add(b, skip)
  middle = Sigmoid(c)
  d = Conv <kernel_shape = [3, 3], group = 8, pads = [1, 1, 1, 1]> (c, w1)
  e = HardSwish(d)
  f = MaxPool <kernel_shape = [2, 2]> (e)
  h = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (f)
  i = Flatten(h)
  j = Gemm <transB = 1> (i, w2, b2)
  y = Softmax <axis = -1> (j)
}
"""


def model(shapes: dict[str, tuple[int, ...]], text: str = MODEL) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(5)
    for name, shape in shapes.items():
        value = rng.normal(0, 0.4, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return ir.from_proto(proto)


WEIGHTS = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 1, 3, 3), "w2": (4, 32), "b2": (4,)}


def samples(count: int = 12) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    shapes = {"x": (1, 3, 10, 9), "skip": (1, 8, 5, 5)}
    return [{n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(count)]


@dataclass
class Told:
    """A ``Progress`` that keeps what it is told."""

    events: list[tuple[str, str]] = field(default_factory=list)

    def phase(self, name: str) -> None:
        self.events.append(("phase", name))

    def step(self, done: int, total: int, what: str) -> None:
        pass

    def note(self, text: str) -> None:
        self.events.append(("note", text))


@dataclass(frozen=True)
class Made:
    """A compiled model, and what was told meanwhile."""

    bundle: Bundle
    told: Told


@pytest.fixture(scope="module")
def made(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Made:
    told = Told()
    return Made(compiled(profile.name, tmp_path_factory.mktemp(profile.name), told), told)


def compiled(target: str, folder: Path, progress: Told | None = None) -> Bundle:
    path = folder / "model.onnx"
    ir.save(model(WEIGHTS), path)
    options = Options(model=path, target=target, data=samples(), output=folder / "out")
    bundle = compile_model(options, progress)
    assert bundle is not None
    return bundle


def check_plan(bundle: Bundle, profile: Profile, told: Told) -> None:
    """RAM is within a tenth of both plans: the one told first, and the one with the stack of the machine code."""
    used = emulated.measure(bundle.path, next(bundle.golden()).inputs, profile)
    planned = emulated.read_record(bundle.path / "lib")["memory"]
    assert used["stack_bytes"] <= planned["stack_bytes"]
    assert used["arena_bytes"] <= planned["arena_bytes"]
    assert abs(used["ram_bytes"] - planned["ram_bytes"]) <= 0.1 * planned["ram_bytes"]
    at = told.events.index(("phase", "lower"))
    (kind, text), following = told.events[at + 1 : at + 3]
    assert kind == "note" and following[0] == "phase"
    first = re.match(r"planned: RAM ([0-9.]+) (k?B) ?", text)
    assert first is not None
    told_bytes = float(first[1]) * {"B": 1, "kB": 1000}[first[2]]
    assert abs(used["ram_bytes"] - told_bytes) <= 0.1 * told_bytes
    assert used["flash_bytes"] <= (profile.limits.flash_bytes or math.inf)


def test_a_model_is_exact_within_its_plan(profile: Profile, made: Made) -> None:
    """Two inputs, two outputs, integers and a float island; RAM within a tenth of the plan."""
    bundle = made.bundle
    found = bundle.report["verification"]
    assert (found["executed"], found["passed"]) == (executed_on(profile), True)
    assert found["calls"] >= 2 * 8
    # A golden float output differs by roundings of exp and division only.
    golden = [o for o in found["outputs"] if o["reference"] == "golden"]
    assert {o["output"] for o in golden} == {"y", "middle"}
    assert all(o["difference"]["largest"] < 1e-5 for o in golden)
    used = emulated.measure(bundle.path, next(bundle.golden()).inputs, profile)
    planned = emulated.read_record(bundle.path / "lib")["memory"]
    assert used["constant_bytes"] >= planned["constant_bytes"]
    assert used["instructions"] > 5_000
    names = ["RAM", "Code and constants"] if profile.name == LINUX else ["RAM on the board", "Flash"]
    assert [m["label"] for m in found["measurements"]] == [*names, "Instructions"]
    check_plan(bundle, profile, made.told)
    deployment = bundle.report["deployment"]
    assert deployment["bytes"] == used["flash_bytes"]
    assert deployment["functions"][0]["memory"]["peak_bytes"] == planned["ram_bytes"]
    page = (bundle.path / "report.html").read_text()
    assert "To ship" in page and "Working memory" in page


def test_the_board_counts_instructions_the_same_way_twice(profile: Profile, made: Made) -> None:
    feeds = next(made.bundle.golden()).inputs
    first, second = (emulated.measure(made.bundle.path, feeds, profile) for _ in range(2))
    assert first == second


def test_an_input_of_another_shape_is_refused(made: Made) -> None:
    with pytest.raises(DataError, match="expected shape"):
        made.bundle.run({"x": np.zeros((1, 3, 9, 9), np.float32), "skip": np.zeros((1, 8, 5, 5), np.float32)})


def small_device(folder: Path, ram: int, flash: int) -> Path:
    path = folder / "small.yaml"
    path.write_text(
        "schema: 1\nname: small\nextends: cortex-m4\ndescription: too small\n"
        f"limits: {{ram_bytes: {ram}, flash_bytes: {flash}}}\n"
        "provenance: {limits: {source: test, confidence: estimate}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("ram", "flash", "memory"),
    [(1000, 2000000, "RAM"), (64000, 600, "flash"), (64000, 4000, "bytes of flash")],
)
def test_a_device_that_is_too_small_is_refused(ram: int, flash: int, memory: str, tmp_path: Path) -> None:
    """By the plan for RAM and constants, by the linked program for code; nothing is written."""
    pytest.importorskip("ziglang", reason="needs ziglang, which links for bare metal")
    with pytest.raises(InfeasibleBudgetError, match=memory) as found:
        compiled(str(small_device(tmp_path, ram, flash)), tmp_path)
    assert found.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_more_stack_than_planned_is_an_error() -> None:
    record = {"memory": {"stack_bytes": 500}}
    emulated._check_stack({"stack_bytes": 500}, record, load_profile("cortex-m4"))
    with pytest.raises(InternalError, match="used 501 bytes of stack"):
        emulated._check_stack({"stack_bytes": 501}, record, load_profile("cortex-m4"))


def test_an_operator_that_needs_a_runtime_is_refused(tmp_path: Path) -> None:
    """There is no ONNX Runtime on the device that could take it over."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[1, 8] x) => (float[1, 8] y) { y = Bernoulli(x) }
    """
    with pytest.raises(ModelError) as found:
        lower_in_worker(model({}, text), load_profile("cortex-m4"), tmp_path)
    assert "Bernoulli" in found.value.what
    assert "no runtime" in found.value.fix


def test_a_missing_emulator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated.shutil, "which", lambda _: None)
    assert "qemu-system-arm" in (BACKEND.why_not_executable(load_profile("cortex-m4")) or "")


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitwright.targets.cortex_m import linking

    monkeypatch.setattr(linking, "find_spec", lambda _: None)
    with pytest.raises(ToolchainError, match="ziglang is not installed"):
        linking.find_compiler(load_profile("cortex-m4"))


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.skipif("BITWRIGHT_ZOO" not in os.environ, reason="BITWRIGHT_ZOO names no model collection")
@pytest.mark.parametrize("name", ["kws_dscnn", "ad_autoencoder", "resnet8_cifar10", "vww_mobilenet"])
def test_real_models_fit_their_plans(name: str, profile: Profile, tmp_path: Path) -> None:
    import zoo  # reads BITWRIGHT_ZOO

    entry = zoo.model_named(name)
    told = Told()
    # Nothing is asked about accuracy here: memory and code are the same after a few samples, and an emulated call takes
    # seconds.
    data = list(islice(entry.samples(), 10))
    options = Options(model=entry.path, target=profile.name, data=data, output=tmp_path / "out", golden=1)
    bundle = compile_model(options, told)
    assert bundle is not None
    found = bundle.report["verification"]
    assert (found["executed"], found["passed"]) == (executed_on(profile), True)
    check_plan(bundle, profile, told)
