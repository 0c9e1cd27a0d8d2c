"""Contestants in processes of their own: turns, errors that cross the pipe, processes that die."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from bitwright.compiler.bench.comparison import bench
from bitwright.compiler.bench.entry import Entry, entry_from_json
from bitwright.compiler.bench.quiet import Surroundings
from bitwright.compiler.bench.turns import take_turns
from bitwright.compiler.bundle.golden import write_npz
from bitwright.compiler.errors import DataError, ModelError, ToolchainError, UsageError
from bitwright.compiler.ort.session import SessionConfig

MODEL = '<ir_version: 8, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'
ANSWERING = """
import json, sys
sys.stdin.readline()
print(json.dumps({"ready": True, "once_s": 0.01}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": SECONDS, "wall_s": 0.5, "preempted": 3}), flush=True)
"""
DYING = """
import json, os, sys
sys.stdin.readline()
print(json.dumps({"ready": True, "once_s": 0.01}), flush=True)
sys.stdin.readline()
print("the last words", file=sys.stderr, flush=True)
os.abort()
"""


@dataclass(frozen=True)
class Scripted(Entry):
    """A contestant that runs a script instead of a model."""

    script: str = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", self.script]


def scripted(label: str, script: str) -> Scripted:
    return Scripted(label, "onnxruntime", Path("unused"), Path("unused"), script=script)


def answering(label: str, seconds: list[float]) -> Scripted:
    return scripted(label, ANSWERING.replace("SECONDS", repr(seconds)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def feeds(folder: Path, **arrays: np.ndarray) -> Path:
    write_npz(folder / "feeds.npz", arrays)
    return folder / "feeds.npz"


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_every_turn_is_recorded_where_it_belongs():
    entries = [answering("slow", [2.0, 4.0, 9.0]), answering("fast", [1.0, 2.0, 3.0])]
    told: list[tuple[int, int]] = []
    found = take_turns(entries, rounds=3, sessions=2, step=lambda done, total: told.append((done, total)))
    assert found.medians.shape == found.best.shape == (2, 2, 3)
    assert found.seconds("slow") == 4.0 and found.best_seconds("fast") == 1.0
    ratio = found.ratio("slow", "fast")
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    # 12 turns, each preempted three times in half a second.
    assert found.preempted == pytest.approx(6.0)
    assert told == [(k, 6) for k in range(1, 7)] and children() == []


def test_a_process_that_dies_is_named_with_its_last_words():
    with pytest.raises(ToolchainError) as caught:
        take_turns([answering("steady", [1.0]), scripted("frail", DYING)], rounds=2, sessions=1)
    assert caught.value.where == "frail" and "signal 6" in caught.value.what
    assert "the last words" in caught.value.what and children() == []


def test_a_process_that_cannot_start_is_named():
    with pytest.raises(ToolchainError) as caught:
        take_turns([scripted("broken", "raise SystemExit('no such thing')")], rounds=1, sessions=1)
    assert caught.value.where == "broken" and "exit status 1" in caught.value.what


def test_an_error_keeps_its_class_across_the_pipe(model: Path, tmp_path: Path):
    wrong = feeds(tmp_path, x=np.zeros((1, 2, 4), np.float32))
    with pytest.raises(DataError, match="fails on a sample"):
        take_turns([Entry("m", "onnxruntime", model, wrong)], rounds=1, sessions=1)
    nothing = feeds(tmp_path, z=np.zeros((1, 4), np.float32))
    with pytest.raises(DataError, match="input 'x'"):
        take_turns([Entry("m", "onnxruntime", model, nothing)], rounds=1, sessions=1)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot load"):
        take_turns([Entry("b", "onnxruntime", tmp_path / "broken.onnx", nothing)], rounds=1, sessions=1)
    assert children() == []


KILLED = """
import os, signal, sys
from pathlib import Path
from bitwright.compiler.bench.entry import Entry
from bitwright.compiler.bench.turns import Contestant
with Contestant(Entry("m", "onnxruntime", Path(sys.argv[1]), Path(sys.argv[2]))) as contestant:
    contestant.wait_ready(0.001)
    contestant.turn()
    print(contestant._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a child with its parent")
def test_a_stopped_process_ends_with_a_killed_parent(model: Path, tmp_path: Path):
    file = feeds(tmp_path, x=np.zeros((1, 4), np.float32))
    command = [sys.executable, "-c", KILLED, str(model), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == -9
    number = int(done.stdout)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(number).wait(timeout=30)  # raises if it is still there
    assert not psutil.pid_exists(number)


def test_contestants_that_cannot_be_told_apart_are_refused():
    with pytest.raises(UsageError, match="different names"):
        take_turns([answering("a", [1.0]), answering("a", [1.0])])


def test_an_entry_survives_the_pipe():
    config = SessionConfig(optimize=False, session_config_entries={"k": "v"}, disabled_optimizers=["o"])
    entry = Entry("label", "onnxruntime", Path("m.onnx"), Path("f.npz"), 2, config)
    found = entry_from_json(entry.to_json())
    assert (found.label, found.path, found.threads, found.clock) == ("label", Path("m.onnx"), 2, "wall")
    assert found.session.threads == 2 and found.session.session_config_entries == {"k": "v"}
    assert found.session.optimize is False and list(found.session.disabled_optimizers) == ["o"]


def test_a_tiny_real_run(model: Path):
    found = bench(model, _copy(model), rounds=2, sessions=1, turn_s=0.002)
    record = found.to_dict()
    assert record["first_s"] > 0 and record["ratio"] == pytest.approx(record["first_s"] / record["second_s"])
    assert record["interval"][0] <= record["ratio"] <= record["interval"][1]
    assert found.clock == "processor time of the calling thread" and found.data == "random inputs"
    assert ("no difference" in found.verdict()) is not record["difference_shown"]


def _copy(model: Path) -> Path:
    copy = model.with_name("copy.onnx")
    copy.write_bytes(model.read_bytes())
    return copy


def test_a_busy_machine_is_said_where_it_matters():
    busy, idle = Surroundings(6.0, 2, 900.0), Surroundings(1.1, 2, 3.0)
    assert "interval is wide" in busy.warnings(1, 0.2)[0]
    assert busy.warnings(1, 0.01) == () and "wall times" in busy.warnings(2, 0.01)[0]
    assert idle.warnings(1, 0.5) == idle.warnings(2, 0.5) == ()
