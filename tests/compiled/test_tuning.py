"""Tuning for real: kernels compiled and timed in a child process, and choices that reach the artifact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from rpc_farm import loopback_farm

from bitwright.compiler.cli.app import main
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import ProfileError, ToolchainError
from bitwright.compiler.lower.job import lower_in_worker
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import FRONT, compile_model, tune_model
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.workload import workloads_of
from bitwright.compiler.tune.budget import TuneBudget
from bitwright.compiler.tune.child import TuningChild
from bitwright.compiler.tune.hardware import hardware_key
from bitwright.compiler.tune.kernels import Bench
from bitwright.compiler.tune.outcome import Tuning
from bitwright.compiler.tune.records import Key, Record
from bitwright.compiler.tune.remote import open_farm
from bitwright.compiler.tune.store import TuningStore
from bitwright.targets.backend import KernelChoice, backend_for
from bitwright.targets.loader import load_profile

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[1,16,12,12] x) => (float[1,40,12,12] y)
{
  a = Conv<pads=[1,1,1,1]>(x, w0)
  r = Relu(a)
  y = Conv(r, w1)
}
"""
TARGET = "x86-avx2"
FRAGILE = Path(__file__).with_name("fragile_tuning_worker.py")
PROFILE = load_profile(TARGET)

pytestmark = pytest.mark.skipif(
    backend_for(PROFILE.family).why_not_executable(PROFILE) is not None,
    reason=f"{backend_for(PROFILE.family).why_not_executable(PROFILE)}",
)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Options:
    folder = tmp_path_factory.mktemp("tuning")
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(TEXT)
    for name, shape in (("w0", (32, 16, 3, 3)), ("w1", (40, 32, 1, 1))):
        weight = random.normal(0, 0.1, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, folder / "net.onnx")
    samples = [{"x": random.normal(size=(1, 16, 12, 12)).astype(np.float32)} for _ in range(2)]
    return Options(
        model=folder / "net.onnx", target=TARGET, data=samples, tuning_store=folder / "store.jsonl"
    )


@pytest.fixture(scope="module")
def compiled(options) -> Compilation:
    """The compilation up to its static model."""
    c = Compilation(options, PROFILE)
    for name, phase in FRONT:
        if name != "tune":
            phase(c, [])
    return c


def changed(options: Options, **values) -> Options:
    return Options(**{**vars(options), **values})


@pytest.fixture(scope="module")
def tuned(options) -> Tuning:
    return tune_model(changed(options, tune=TuneBudget(trials=10)))


def test_tuning_measures_the_kernels_and_fills_the_store(tuned, options):
    assert 1 < tuned.trials <= 10
    assert tuned.executed == "native"
    assert all(kernel.record is not None for kernel in tuned.kernels)
    assert not any("rejected" in note for note in tuned.notes)
    assert TuningStore(options.tuning_store).read().damaged == 0


def test_a_second_compilation_tunes_nothing(tuned, options):
    before = options.tuning_store.read_bytes()
    start = time.monotonic()
    compile_model(changed(options, tune=TuneBudget(seconds=60), stop_after="tune"))
    assert options.tuning_store.read_bytes() == before
    assert time.monotonic() - start < 5  # starting the process that measures alone takes longer


def test_choices_reach_the_artifact_and_its_report(compiled, options, tmp_path):
    program = extract_program(compiled.static)
    (workload, _) = workloads_of([program])
    backend = backend_for(PROFILE.family)
    # A choice that the default would not make, so that it is seen in the artifact.
    default, *_, last = backend.candidates(program.steps[1], program, PROFILE)
    store = TuningStore(tmp_path / "other.jsonl")
    key = Key(workload.key, hardware_key(PROFILE, backend.hardware()))
    store.append([Record("finished", key, last, 1e-6, 2e-6, trials=9)])
    bundle = compile_model(changed(options, tuning_store=store.path, output=tmp_path / "out"))
    assert bundle is not None
    row, other = bundle.report["tuning"]["kernels"]
    assert (row["kernel"], row["source"], row["ratio"]) == (last.label(), "record", 0.5)
    assert (other["source"], other["record"]) == ("default", None)
    assert default != last
    assert bundle.report["verification"]["passed"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Tuned kernels" in page and row["record"] in page


def test_the_lowering_uses_the_chosen_kernel(compiled, tmp_path):
    """A choice that is no candidate is refused, so the lowering does look at the choices."""
    (workload, _) = workloads_of([extract_program(compiled.static)])
    odd = KernelChoice("implicit_gemm", "avx2_pmaddwd", (("pixels", 99),))
    with pytest.raises(ProfileError, match="pixels=99"):
        lower_in_worker(compiled.static, PROFILE, tmp_path, choices={workload.key: odd})


def test_candidates_that_crash_or_lie_cost_only_themselves(compiled):
    (workload, _) = workloads_of([extract_program(compiled.static)])
    with TuningChild([compiled.static], PROFILE, worker=("-P", str(FRAGILE))) as child:
        found = child.candidates(workload.key)
        by_pixels = {dict(c.params)["pixels"]: c for c in found if "pixels" in dict(c.params)}
        tried = [found[0], *(by_pixels[p] for p in (1, 2, 3) if by_pixels[p] != found[0])]
        timings = {dict(t.choice.params)["pixels"]: t for t in child.measure(workload.key, tried, 2)}
    assert timings[3].status == "crashed" and "signal 11" in timings[3].detail
    assert timings[2].status == "wrong"
    assert timings[1].status == "ok" and 0 < timings[1].seconds < 1


def test_kill_9_while_tuning_keeps_everything_but_the_trial_in_flight(options, tmp_path):
    script = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from bitwright.compiler.options import Options\n"
        "from bitwright.compiler.pipeline import tune_model\n"
        "from bitwright.compiler.tune.budget import TuneBudget\n"
        "samples = [{'x': np.ones((1, 16, 12, 12), np.float32)}]\n"
        "tune_model(Options(model=Path(sys.argv[1]), target=sys.argv[2], data=samples,"
        " tuning_store=Path(sys.argv[3]), tune=TuneBudget(trials=500)))\n"
    )
    store = TuningStore(tmp_path / "store.jsonl")
    command = [sys.executable, "-c", script, str(options.model), TARGET, str(store.path)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not store.path.exists() or len(store.path.read_bytes()) < 3000):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    contents = store.read()
    before = {label for known in contents.known.values() for label in known.trials}
    assert len(before) >= 3 and contents.damaged <= 1
    again = tune_model(changed(options, tuning_store=store.path, tune=TuneBudget(trials=4)))
    after = {label for known in store.read().known.values() for label in known.trials}
    assert before <= after
    assert len(after - before) <= again.trials <= 4


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """A tracker and two servers on this machine; gives the tracker's address."""
    with loopback_farm(tmp_path_factory.mktemp("farm") / "log.txt", "loop", 2) as tracker:
        if tracker is None:
            pytest.skip("TVM's RPC tracker and servers do not start here")
        yield tracker


def test_a_farm_of_boards_on_loopback(farm, options, tmp_path, capsys):
    def cli(*arguments: str) -> tuple[int, dict]:
        code = main([*arguments, "--json"])
        return code, json.loads(capsys.readouterr().out)

    np.savez(tmp_path / "data.npz", x=np.ones((1, 16, 12, 12), np.float32))
    store = str(tmp_path / "store.jsonl")
    common = [str(options.model), "-t", TARGET, "-d", str(tmp_path / "data.npz"), "--tuning-store", store]
    boards = ["--tracker", farm, "--device-key", "loop"]
    code, found = cli("tune", *common, *boards, "--tune", "8")
    assert code == 0, found
    assert (found["executed"], found["trials"]) == ("remote", 8)
    assert "board loop" in found["hardware"]
    assert all(
        record.status == "ok"
        for k in TuningStore(Path(store)).read().known.values()
        for record in k.trials.values()
    )

    code, found = cli("tune", *common, "--device-key", "loop", "--tune", "off")
    assert (code, found["trials"]) == (0, 0)
    assert any(kernel["record"] for kernel in found["kernels"])

    with pytest.raises(ToolchainError, match="loop") as caught:
        open_farm(farm, "unknown")
    assert caught.value.where == "--device-key"


def test_candidates_that_cannot_be_built_do_not_stop_the_others(compiled):
    program = extract_program(compiled.static)
    step, backend = program.steps[1], backend_for(PROFILE.family)
    bench = Bench(step, program, PROFILE, backend)
    good = backend.candidates(step, program, PROFILE)[:2]
    odd = KernelChoice("implicit_gemm", "avx2_pmaddwd", (("pixels", 99),))
    batch = bench.build([good[0], odd, good[1]])
    assert tuple(c.choice for c in batch.candidates) == good
    assert "pixels=99" in batch.failed[odd]
