"""The tuning store: what a crash, a second writer or a damaged file can and cannot do to it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bitwright.compiler.errors import UsageError
from bitwright.compiler.tune.records import Key, Record, dump_line, load_line
from bitwright.compiler.tune.store import TuningStore, default_place
from bitwright.targets.backend import KernelChoice

KEY = Key("QGemm(uint8[1x8])", "x86_cpu | here")
WRITER = """
import sys
from pathlib import Path
from bitwright.compiler.tune.records import Key, Record
from bitwright.compiler.tune.store import TuningStore
from bitwright.targets.backend import KernelChoice
store, name, count = TuningStore(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
for number in range(count):
    choice = KernelChoice("t", name, (("n", number),))
    store.append([Record("trial", Key("w", "h"), choice, 1.0, 2.0)] * 2)
    print(number, flush=True)
"""


def record(number: int, seconds: float = 1e-6, **others) -> Record:
    choice = KernelChoice("implicit_gemm", "avx2_pmaddwd", (("pixels", number), ("vectors", 2)))
    return Record("trial", KEY, choice, seconds, 2e-6, when=float(number), **others)


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def numbers(path: Path, name: str) -> list[int]:
    found = TuningStore(path).read().of(Key("w", "h")).trials.values()
    return sorted(dict(r.choice.params)["n"] for r in found if r.choice.intrinsic == name)


def test_a_record_survives_its_line():
    for one in (
        record(1),
        record(2, float("inf"), status="crashed", detail="signal 11"),
        record(3, trials=40, complete=False),
    ):
        line = dump_line(one).encode()
        assert load_line(line) == (one if one.trials == 0 else record(3))


def test_a_finished_search_survives_its_line():
    one = Record("finished", KEY, record(1).choice, 1e-6, 2e-6, trials=40, complete=False, when=1.0)
    assert load_line(dump_line(one).encode()) == one


def test_a_missing_store_is_empty_and_reading_creates_nothing(tmp_path):
    path = tmp_path / "folder" / "store.jsonl"
    assert TuningStore(path).read().known == {}
    assert not path.parent.exists()


def test_a_store_cut_anywhere_loses_only_its_last_record(tmp_path):
    store = TuningStore(tmp_path / "store.jsonl")
    store.append([record(k) for k in range(3)])
    whole = store.path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole) - 1):
        store.path.write_bytes(whole[:end])
        contents = store.read()
        assert (len(contents.of(KEY).trials), contents.damaged) == (2, 1)


def test_an_append_behind_a_torn_line_keeps_both_sides(tmp_path):
    store = TuningStore(tmp_path / "store.jsonl")
    store.append([record(0), record(1)])
    store.path.write_bytes(store.path.read_bytes()[:-9])
    store.append([record(2)])
    contents = store.read()
    assert sorted(r.when for r in contents.of(KEY).trials.values()) == [0.0, 2.0]
    assert contents.damaged == 1


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"[" * 20000 + b"\n",
        b"00000000 {}\n",
        b"\n",
        dump_line(record(7)).encode().replace(b'"pixels":7', b'"pixels":6'),
        dump_line(record(7)).encode()[1:],
    ],
)
def test_what_is_no_record_is_skipped(line, tmp_path):
    store = TuningStore(tmp_path / "store.jsonl")
    store.append([record(1)])
    with store.path.open("ab") as file:
        file.write(line)
    store.append([record(2)])
    contents = store.read()
    assert len(contents.of(KEY).trials) == 2
    assert contents.damaged == (line != b"\n")


def test_records_that_cannot_be_true_are_refused():
    import json
    import zlib

    for change in ({"seconds": -1.0}, {"default_s": 0.0}, {"status": "great"}, {"v": 2}, {"choice": []}):
        plain = json.loads(dump_line(record(1))[9:]) | change
        text = json.dumps(plain).encode()
        assert load_line(b"%08x %s\n" % (zlib.crc32(text), text)) is None


def test_of_two_finished_searches_the_complete_and_then_the_faster_counts(tmp_path):
    store = TuningStore(tmp_path / "store.jsonl")

    def ended(number: int, seconds: float, *, complete: bool) -> Record:
        return Record("finished", KEY, record(number).choice, seconds, 2e-6, trials=9, complete=complete)

    store.append([ended(1, 1.0e-6, complete=True), ended(2, 0.5e-6, complete=False)])
    assert store.read().of(KEY).finished.seconds == 1.0e-6
    store.append([ended(3, 0.8e-6, complete=True), ended(4, 0.9e-6, complete=True)])
    assert store.read().of(KEY).finished.seconds == 0.8e-6


def test_kill_9_loses_at_most_the_record_in_flight(tmp_path):
    path = tmp_path / "store.jsonl"
    moments = random.Random(5)
    for turn in range(6):
        process = writer(path, f"w{turn}", 10_000)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        told = process.stdout.read().split()
        process.wait()
        last = int(told[-1]) if told else 0
        assert numbers(path, f"w{turn}") in (list(range(last + 1)), list(range(last + 2)))
    store = TuningStore(path)
    store.append([record(1)])
    assert store.read().of(KEY).trials


def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "store.jsonl"
    processes = [writer(path, name, 150) for name in ("a", "b")]
    assert [p.wait(60) for p in processes if p.stdout and p.stdout.read()] == [0, 0]
    assert numbers(path, "a") == numbers(path, "b") == list(range(150))
    assert TuningStore(path).read().damaged == 0


def test_stores_are_merged_by_putting_one_behind_the_other(tmp_path):
    one, other = TuningStore(tmp_path / "a"), TuningStore(tmp_path / "b")
    one.append([record(1), record(2)])
    other.append([record(2), record(3)])
    both = TuningStore(tmp_path / "both")
    both.path.write_bytes(one.path.read_bytes() + other.path.read_bytes())
    assert len(both.read().of(KEY).trials) == 3


def test_a_place_that_cannot_be_used_is_an_error_with_a_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--tuning-store"):
        TuningStore(tmp_path / "file" / "store.jsonl").append([record(1)])
    with pytest.raises(UsageError, match="cannot be read"):
        TuningStore(tmp_path).read()


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_place() == tmp_path / "bitwright" / "tuning" / "records.jsonl"
    assert not (tmp_path / "bitwright").exists()


@pytest.mark.parametrize("text", [b"dear diary\n", b'{"a": 1}\n', b"000000009\n", b"\x89PNG\r\n"])
def test_a_file_that_is_something_else_is_left_alone(text, tmp_path):
    path = tmp_path / "mine"
    path.write_bytes(text)
    with pytest.raises(UsageError, match="is no tuning store") as caught:
        TuningStore(path).read()
    assert "--tuning-store" in caught.value.fix
    assert path.read_bytes() == text


@pytest.mark.parametrize("length", range(12))
def test_a_first_record_of_any_length_is_torn_and_not_foreign(length, tmp_path):
    store = TuningStore(tmp_path / "store")
    store.path.write_bytes(dump_line(record(1)).encode()[:length])
    store.append([record(2)])
    assert len(store.read().of(KEY).trials) == 1
