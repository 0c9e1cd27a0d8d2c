"""An output folder appears whole or not at all: refusals, replacement, kills, a full disk."""

import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.bundle.writer import BundleWriter
from bitwright.compiler.errors import UsageError
from bitwright.targets.schema import Profile

KILLS = 20
PROFILE = {
    "schema": 1,
    "name": "test-cpu",
    "family": "x86_cpu",
    "description": "a processor for tests",
    "provenance": {},
    "clock_hz": 1e9,
    "cores": 1,
    "codegen": {"mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"},
    "compute": [{"name": "llvm", "weight": "s8", "act": "u8", "acc": "s32", "macs_per_cycle": 1.0}],
    "memory": [{"name": "ram", "size_bytes": 1e9, "bytes_per_s": 1e9}],
    "qspaces": {},
    "runtimes": {"artifact": {"ops": {}}, "onnxruntime": {"ops": {}}},
    "toolchain": {"triple": "x86_64-linux-gnu"},
}


def write_for_ever(target: Path, profile: Profile, written: Connection) -> None:
    """Write bundles whose files all hold the generation number."""
    for generation in itertools.count():
        with BundleWriter(target) as writer:
            (writer.path / "lib").mkdir()
            for k in range(5):
                (writer.path / "lib" / f"{k}.bin").write_bytes(b"%d" % generation * 20000)
            writer.commit(profile)
        written.send(generation)


@pytest.fixture
def profile() -> Profile:
    return Profile.model_validate_json(json.dumps(PROFILE))


def write_bundle(target: Path, profile: Profile, text: str = "hello") -> None:
    with BundleWriter(target) as writer:
        (writer.path / "lib").mkdir()
        (writer.path / "lib" / "a.txt").write_text(text)
        (writer.path / "plan.yaml").write_text("nodes: {}\n")
        writer.commit(profile, {"linker": "gcc 1"})


def test_a_committed_bundle_opens(tmp_path: Path, profile: Profile) -> None:
    write_bundle(tmp_path / "deep" / "out", profile)
    bundle = Bundle.open(tmp_path / "deep" / "out")
    assert bundle.profile == profile
    assert set(bundle.manifest.files) == {"lib/a.txt", "plan.yaml"}
    assert bundle.manifest.versions["linker"] == "gcc 1"
    assert bundle.plan_text == "nodes: {}\n"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_equal_content_gives_equal_bytes(tmp_path: Path, profile: Profile) -> None:
    for name in ("a", "b"):
        write_bundle(tmp_path / name, profile)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("a", "b")]
    assert manifests[0] == manifests[1]


def test_without_commit_nothing_appears(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        (writer.path / "a").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_old_bundle(tmp_path: Path, profile: Profile) -> None:
    write_bundle(tmp_path / "out", profile, "old")
    with pytest.raises(KeyError), BundleWriter(tmp_path / "out"):
        raise KeyError
    Bundle.open(tmp_path / "out")
    assert (tmp_path / "out/lib/a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_bundle_replaces_a_bundle(tmp_path: Path, profile: Profile) -> None:
    write_bundle(tmp_path / "out", profile, "old")
    write_bundle(tmp_path / "out", profile, "new")
    Bundle.open(tmp_path / "out")
    assert (tmp_path / "out/lib/a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path, profile: Profile) -> None:
    (tmp_path / "out").mkdir()
    write_bundle(tmp_path / "out", profile)
    Bundle.open(tmp_path / "out")


@pytest.mark.parametrize("foreign", ["folder", "file", "other manifest"])
def test_foreign_content_is_never_replaced(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    if foreign == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("thesis.tex" if foreign == "folder" else "manifest.json")).write_text("{}")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UsageError), BundleWriter(out):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "lib/a.txt").write_text("hellO"), "changed"),
        (lambda out: (out / "lib/a.txt").unlink(), "missing"),
        (lambda out: (out / "manifest.json").unlink(), "no readable manifest"),
        (lambda out: (out / "manifest.json").write_text("{"), "damaged"),
    ],
)
def test_damage_is_found_on_opening(tmp_path: Path, profile: Profile, damage, message: str) -> None:
    write_bundle(tmp_path / "out", profile)
    damage(tmp_path / "out")
    with pytest.raises(UsageError, match=message):
        Bundle.open(tmp_path / "out")


def test_a_manifest_cannot_point_outside(tmp_path: Path, profile: Profile) -> None:
    write_bundle(tmp_path / "out", profile)
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(manifest.read_text().replace("lib/a.txt", "../a.txt"))
    with pytest.raises(UsageError, match="outside"):
        Bundle.open(tmp_path / "out")


def dead_process_number() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_kept(
    tmp_path: Path, profile: Profile
) -> None:
    dead = tmp_path / f".out.tmp-{dead_process_number()}"
    living = tmp_path / f".out.tmp-{os.getppid()}"
    for folder in (dead, living):
        folder.mkdir()
    write_bundle(tmp_path / "out", profile)
    assert not dead.exists()
    assert living.exists()


def test_a_bundle_that_was_moved_aside_is_put_back(tmp_path: Path, profile: Profile) -> None:
    write_bundle(tmp_path / "out", profile, "old")
    (tmp_path / "out").rename(tmp_path / f".out.old-{dead_process_number()}")
    with BundleWriter(tmp_path / "out"):
        pass
    Bundle.open(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def start_writer(out: Path, profile: Profile) -> tuple[BaseProcess, Connection]:
    # A fork starts in milliseconds, which is what lets a kill hit the first write.
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=write_for_ever, args=(out, profile, sending))
    child.start()
    return child, receiving


def kill(child: BaseProcess) -> None:
    child.kill()
    child.join()


def test_killed_writers_leave_a_whole_bundle_or_none(tmp_path: Path, profile: Profile) -> None:
    """Half of the kills hit the first write (whole or none), half a replacement (whole, old or new)."""
    child, written = start_writer(tmp_path / "timing", profile)
    written.recv()
    start = time.monotonic()
    written.recv()
    one_write = time.monotonic() - start
    kill(child)
    chance = random.Random(7)
    for number in range(KILLS):
        replaces = number % 2 == 0
        out = tmp_path / ("out" if replaces else f"fresh{number}")
        child, written = start_writer(out, profile)
        if replaces:
            written.recv()
        time.sleep(chance.uniform(0, 2 * one_write))
        kill(child)
        if replaces and not out.exists():
            # Killed between the two renames: the next run puts the old bundle back.
            with BundleWriter(out):
                pass
            assert out.exists()
        if out.exists():
            Bundle.open(out)
            assert len({p.read_bytes() for p in (out / "lib").iterdir()}) == 1


LIMITED = """
import resource, sys
from pathlib import Path
from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.bundle.writer import BundleWriter
from bitwright.compiler.errors import UsageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if sys.argv[2] == "bundle":
        with BundleWriter(Path(sys.argv[1])) as writer:
            (writer.path / "big").write_bytes(bytes(5000))
    else:
        write_atomically(Path(sys.argv[1]), bytes(5000))
except UsageError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["bundle", "file"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out"), kind],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write the output" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "q.onnx", b"old")
    write_atomically(tmp_path / "q.onnx", b"new")
    assert (tmp_path / "q.onnx").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "out", b"old")
    subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out"), "file"], check=True, capture_output=True
    )
    assert (tmp_path / "out").read_bytes() == b"old"


def identity_model() -> ir.Model:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Identity(x) }'
    return ir.from_proto(onnx.parser.parse_model(text))


def test_a_model_and_its_companions_appear_together(tmp_path: Path) -> None:
    path = tmp_path / "new" / "q.onnx"
    write_model_atomically(identity_model(), path, {path.with_name("q.session.json"): "{}\n"})
    assert sorted(p.name for p in path.parent.iterdir()) == ["q.onnx", "q.session.json"]
    assert [n.op_type for n in ir.load(path).graph] == ["Identity"]


def test_a_model_that_does_not_fit_leaves_the_old_companion(tmp_path: Path) -> None:
    companion = tmp_path / "q.session.json"
    companion.write_text("old")
    child = """
import resource, sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.errors import UsageError
value = ir.Value(name="w", const_value=ir.tensor(np.zeros(5000, "float32"), name="w"))
model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21}), ir_version=10)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
try:
    write_model_atomically(model, folder / "q.onnx", {folder / "q.session.json": "new"})
except UsageError:
    sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], check=False)
    assert done.returncode == 2
    assert companion.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["q.session.json"]
