"""External data that is missing, too short, elsewhere, or not what it says it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from bitwright.compiler.graph.mapped import MappedTensor
from bitwright.compiler.ingest.model_reader import read_model

from . import build
from .memory import takes_at_most
from .refusals import refusal


def external(folder: Path, location: str = "w.bin", data: bytes | None = None, **entries: str) -> Path:
    model = build.net()
    content = build.make_external(model, location=location, **entries)
    (folder / "w.bin").write_bytes(content if data is None else data)
    return build.write(model, folder)


def test_external_data_stays_on_disk(tmp_path):
    path = external(tmp_path)
    source = read_model(path)
    tensor = source.model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    assert tensor.tobytes() == build.initializer(build.net(), "w").raw_data
    assert source.external_files == ((tmp_path / "w.bin").resolve(),)
    both = path.read_bytes() + (tmp_path / "w.bin").read_bytes()
    assert (source.bytes, source.sha256) == (len(both), hashlib.sha256(both).hexdigest())


def test_external_data_in_a_subfolder(tmp_path):
    (tmp_path / "sub").mkdir()
    path = external(tmp_path, "sub/w.bin")
    (tmp_path / "w.bin").rename(tmp_path / "sub" / "w.bin")
    assert len(read_model(path).external_files) == 1


@pytest.mark.parametrize(
    "location", ["../w.bin", "sub/../../w.bin", "/etc/passwd", "..\\w.bin", "C:\\w.bin", "a\0b"]
)
def test_external_path_that_leaves_the_folder(tmp_path, location):
    refusal(external(tmp_path, location), "tensor 'w'", "external data location")


def test_external_missing_short_and_special(tmp_path):
    refusal(external(tmp_path, "none.bin"), "tensor 'w'", "'none.bin'", "cannot be found")
    refusal(external(tmp_path, data=b"\0" * 100), "tensor 'w'", "100 bytes", "432")
    refusal(external(tmp_path, "."), "tensor 'w'", "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refusal(external(tmp_path, "pipe"), "tensor 'w'", "not a regular file")


def test_external_links(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "secret.bin"
    inside.mkdir()
    outside.write_bytes(b"\0" * 432)
    path = external(inside, "link.bin")
    (inside / "link.bin").symlink_to(outside)
    refusal(path, "tensor 'w'", "symbolic link")
    (inside / "link.bin").unlink()
    (inside / "link.bin").symlink_to(inside / "w.bin")
    refusal(path, "tensor 'w'", "symbolic link")
    (inside / "link.bin").unlink()
    (inside / "link.bin").hardlink_to(outside)
    refusal(path, "tensor 'w'", "2 hard links")
    (inside / "folder").symlink_to(tmp_path)
    refusal(external(inside, "folder/secret.bin"), "tensor 'w'", "symbolic link")


@pytest.mark.parametrize(
    ("entries", "needle"),
    [
        ({"offset": "-8"}, "offset"),
        ({"offset": "0x10"}, "offset"),
        ({"offset": str(2**62)}, "432 bytes"),
        ({"length": str(2**62)}, "length"),
        ({"length": "431"}, "432 bytes"),
        ({"length": "\u0664\u0663\u0662"}, "length"),
        ({"offset": "4", "length": "432"}, "432 bytes"),
        ({"__class__": "x"}, "unknown key '__class__'"),
        ({"checksum": "0" * 40}, "SHA-1"),
    ],
)
def test_external_entries(tmp_path, entries, needle):
    refusal(external(tmp_path, **entries), "'w", needle)


def test_external_checksum_that_fits(tmp_path):
    data = build.initializer(build.net(), "w").raw_data
    read_model(external(tmp_path, checksum=hashlib.sha1(data, usedforsecurity=False).hexdigest()))


def test_external_nan(tmp_path):
    weights = np.ones((4, 3, 3, 3), np.float32)
    weights[3, 2, 1, 0] = np.nan
    refusal(external(tmp_path, data=weights.tobytes()), "tensor 'w'", "[3, 2, 1, 0]")


def test_sparse_and_stored_parts_of_a_data_file_are_both_seen(tmp_path):
    """Holes are not read; a NaN behind gigabytes of them, at an odd place, is found all the same."""
    model = build.parsed("g (float[N, 1000] x) => (float[N, 9000] y) { [big] y = MatMul (x, w) }")
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1000, 9000])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    tensor.external_data.add(key="offset", value="3")
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(3 + 4 * 9_000_000)
        stream.seek(3 + 4 * (700 * 9000 + 5))
        stream.write(np.float32(np.nan).tobytes())
    path = build.write(model, tmp_path)
    refusal(path, "tensor 'w'", "[700, 5]")
    with (tmp_path / "w.bin").open("r+b") as stream:
        stream.seek(3 + 4 * (700 * 9000 + 5))
        stream.write(np.float32(1).tobytes())
    both = path.read_bytes() + (tmp_path / "w.bin").read_bytes()
    assert read_model(path).sha256 == hashlib.sha256(both).hexdigest()


def test_model_above_two_gigabytes(tmp_path):
    rows = 540_000
    model = build.parsed(f"g (float[N, 1000] x) => (float[N, {rows}] y) {{ [big] y = MatMul (x, w) }}")
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1000, rows])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(4 * 1000 * rows)
    path = build.write(model, tmp_path)
    with takes_at_most(50_000):  # the file is hashed and checked in pieces of 1 MiB
        source = read_model(path)
    assert source.bytes > 2**31
    assert source.model.graph.initializers["w"].const_value.nbytes == 4 * 1000 * rows
