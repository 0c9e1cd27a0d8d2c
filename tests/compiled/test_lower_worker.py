"""The child process: what comes back, what a crash looks like, and that equal inputs give equal bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from lower_helpers import PlainBackend

from bitwright.compiler.errors import InternalError, ModelError, ToolchainError
from bitwright.compiler.lower.job import Job, lower_in_worker
from bitwright.compiler.lower.kernel_table import load_table
from bitwright.compiler.lower.memory_plan import MemoryPlan, MemoryStep, dump_plans
from bitwright.compiler.lower.worker import run
from bitwright.targets.schema import (
    Codegen,
    Combo,
    ComputeRow,
    MemoryLevel,
    OpRule,
    Profile,
    Provenance,
    QSpace,
    Runtime,
    Runtimes,
    Toolchain,
)

PLAIN_WORKER = (str(Path(__file__).parent / "plain_worker.py"),)


@pytest.fixture(scope="module")
def profile():
    rule = OpRule(role="anchor", combos=(Combo(act="a", weight="w", out=("a",)),))
    section = Provenance(source="test", confidence="estimate")
    return Profile(
        schema=1, name="test", family="x86_cpu", description="test", clock_hz=1e9, cores=1,
        provenance=dict.fromkeys(("clock_hz", "compute", "memory"), section),
        codegen=Codegen(mtriple="x86_64-linux-gnu", mcpu="x86-64-v3"),
        compute=(ComputeRow(name="plain", weight="s8", act="u8", acc="s32", macs_per_cycle=1.0),),
        memory=(MemoryLevel(name="ram", size_bytes=1e9, bytes_per_s=1e9),),
        qspaces={"a": QSpace(signed=False), "w": QSpace(symmetric=True)},
        runtimes=Runtimes(artifact=Runtime(ops={"Conv": rule}), onnxruntime=Runtime(ops={})),
        toolchain=Toolchain(triple="x86_64-linux-gnu"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    text = """<ir_version: 9, opset_import: ["": 17]>
    g (float[1,2,4,4] x) => (float[1,3,4,4] y) <
        float sx = {0.05}, uint8 zx = {128}, float[3] sw = {0.01, 0.02, 0.03}, int8[3] zw = {0, 0, 0},
        float sy = {0.1}, uint8 zy = {100}, int8[3,2,1,1] w = {10, -20, 30, -40, 50, 127}>
    {
        xq = QuantizeLinear(x, sx, zx)
        xd = DequantizeLinear(xq, sx, zx)
        wd = DequantizeLinear<axis=0>(w, sw, zw)
        [conv] c = Conv(xd, wd)
        cq = QuantizeLinear(c, sy, zy)
        y = DequantizeLinear(cq, sy, zy)
    }"""
    return ir.from_proto(onnx.parser.parse_model(text))


def script(tmp_path, body):
    """A child that does ``body`` in the job's folder instead of lowering."""
    path = tmp_path / "child.py"
    head = "import json, os, pathlib, signal, sys, time\njob = pathlib.Path(sys.argv[1])\n"
    path.write_text(head + body)
    return (str(path),)


def kept_job(error):
    folder = Path(error.fix.split("kept in ")[1].split(";")[0])
    assert (folder / "model.onnx").exists() and (folder / "profile.json").exists()
    return folder


def test_objects_and_kernel_table_come_back(model, profile, tmp_path):
    shown = []
    result = lower_in_worker(
        model, profile, tmp_path, timeout_s=120, worker=PLAIN_WORKER, planned=shown.append
    )
    assert shown == [result.memory] and result.memory["main"].peak_bytes > 0
    assert sorted(p.name for p in result.objects) == ["devc.o", "lib0.o"]
    assert all(p.parent == tmp_path and p.read_bytes()[:4] == b"\x7fELF" for p in result.objects)
    assert [call.operation for call in result.kernel_table] == ["Quantize", "QConv", "Dequantize"]
    assert load_table((tmp_path / "kernels.json").read_text()) == result.kernel_table
    assert 0 < result.seconds < 120


def test_equal_inputs_give_equal_bytes(model, profile, tmp_path):
    digests = []
    for seed in ("1", "2"):
        job = Job(tmp_path / seed)
        job.folder.mkdir()
        ir.save(model, job.model)
        job.profile.write_text(json.dumps(profile.dump()))
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TVM_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, *PLAIN_WORKER, str(job.folder)], env=environment, check=True, timeout=120
        )
        files = [*sorted(job.objects.iterdir()), job.kernels]
        digests.append([f.read_bytes() for f in files])
    assert digests[0] == digests[1]


def test_a_crash_names_signal_and_step(model, profile, tmp_path):
    child = script(
        tmp_path,
        "(job / 'progress.txt').write_text(\"'conv'\")\nprint('last words', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSEGV)\n",
    )
    with pytest.raises(
        ToolchainError, match="TVM died with signal 11 while lowering 'conv'; last output: last words"
    ) as e:
        lower_in_worker(model, profile, tmp_path, worker=child)
    kept_job(e.value)


def test_the_memory_plan_arrives_while_the_child_works(model, profile, tmp_path):
    plans = {"main": MemoryPlan(1, (MemoryStep("conv", 10, 20, 0),), 20, 10, 30)}
    seen = tmp_path / "seen"
    child = script(
        tmp_path,
        f"(job / 'draft').write_text({dump_plans(plans)!r})\n(job / 'draft').replace(job / 'memory.json')\n"
        f"while not os.path.exists({str(seen)!r}): time.sleep(0.01)\n",
    )
    found = []

    def planned(shown):
        found.append(shown)
        seen.touch()  # only now the child goes on

    with pytest.raises(ToolchainError, match="ended with status 0"):
        lower_in_worker(model, profile, tmp_path, timeout_s=60, worker=child, planned=planned)
    assert found == [plans]


def test_an_interrupt_ends_the_child(model, profile, tmp_path):
    note = tmp_path / "pid"
    child = script(
        tmp_path,
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
        f"(job / 'draft').write_text({dump_plans({})!r})\n(job / 'draft').replace(job / 'memory.json')\n"
        "time.sleep(60)\n",
    )

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lower_in_worker(model, profile, tmp_path, worker=child, planned=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_a_time_limit_is_kept(model, profile, tmp_path):
    child = script(tmp_path, "(job / 'progress.txt').write_text(\"'conv'\")\ntime.sleep(60)\n")
    with pytest.raises(ToolchainError, match="stopped after 1 s while lowering 'conv'"):
        lower_in_worker(model, profile, tmp_path, timeout_s=1, worker=child)


def test_an_exit_without_a_result_is_an_error(model, profile, tmp_path):
    with pytest.raises(ToolchainError, match="ended with status 0"):
        lower_in_worker(model, profile, tmp_path, worker=script(tmp_path, ""))


def test_errors_of_the_child_keep_their_class(model, profile, tmp_path):
    fields = {"class": "ModelError", "what": "too odd", "where": "node 'a'", "fix": "rename it"}
    child = script(tmp_path, f"(job / 'error.json').write_text(json.dumps({fields!r}))\nsys.exit(1)\n")
    with pytest.raises(ModelError, match="node 'a': too odd") as e:
        lower_in_worker(model, profile, tmp_path, worker=child)
    assert (e.value.what, e.value.where, e.value.fix) == ("too odd", "node 'a'", "rename it")


def test_an_unknown_error_class_is_our_bug(model, profile, tmp_path):
    fields = {"class": "annotations", "what": "w", "where": "", "fix": ""}
    child = script(tmp_path, f"(job / 'error.json').write_text(json.dumps({fields!r}))\nsys.exit(1)\n")
    with pytest.raises(InternalError):
        lower_in_worker(model, profile, tmp_path, worker=child)


def test_an_operator_tvm_lacks_is_left_to_onnxruntime(profile, tmp_path):
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[2,3,3] x) => (float[2] y) { [odd] y = Det(x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    result = lower_in_worker(model, profile, tmp_path, timeout_s=120, worker=PLAIN_WORKER)
    (found,) = result.not_lowered
    assert (found.nodes, found.operators) == (("odd",), ("Det",))
    assert "node 'odd' (Det)" in found.reason
    (segment,) = result.segments
    assert (segment.executor, segment.objects, segment.kernel_table) == ("onnxruntime", (), ())
    assert [n.op_type for n in onnx.load(segment.model).graph.node] == ["Det"]
    assert result.objects == ()


def test_a_failure_that_is_no_missing_operator_stays_an_error(model, profile, tmp_path):
    class Broken(PlainBackend):
        def dot_kernel(self, step, program, profile, choice=None):
            raise ToolchainError("no such instruction", where=step.name)

    job = Job(tmp_path)
    ir.save(model, job.model)
    job.profile.write_text(json.dumps(profile.dump()))
    with pytest.raises(ToolchainError, match="conv: no such instruction"):
        run(job, Broken())
    assert not job.result.exists()
