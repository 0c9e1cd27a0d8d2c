"""Hugging Face folders made to hurt: cut off, mutated, lying about sizes, files that are none."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CheckpointSizes, safetensors_header, write_checkpoint

from bitwright.compiler.errors import BitwrightError, ModelError, UsageError
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.config import read_config
from bitwright.compiler.hugging_face.json_file import parse_object
from bitwright.compiler.hugging_face.safetensors import Caps, SafetensorsFile

from .refusals import cheap_refusal


def read(path: Path, data: bytes, caps: Caps | None = None) -> None:
    """Read a file and all of its tensors."""
    path.write_bytes(data)
    file = SafetensorsFile(path, caps or Caps())
    for name in file.tensors:
        file.part(name)


def refused(path: Path, data: bytes, caps: Caps | None = None) -> str:
    """Return the message of a refusal."""
    with cheap_refusal() as caught:
        read(path, data, caps)
    assert str(path) in caught.value.where
    return str(caught.value)


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def good_file() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry("BF16", [4], [24, 32]),
        "c": entry("F16", [], [32, 34]),
    }
    return safetensors_header(header) + bytes(34)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = good_file()
    read(tmp_path / "a.safetensors", data)
    for length in range(len(data)):
        refused(tmp_path / "a.safetensors", data[:length])
    assert "the file at" in refused(tmp_path / "a.safetensors", data + b"\0")


def test_any_mutated_byte_is_read_or_refused(tmp_path: Path) -> None:
    data, random = good_file(), np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for at in range(len(data)):
        for value in (data[at] ^ 1, data[at] ^ 0x80, int(random.integers(256))):
            changed = bytearray(data)
            changed[at] = value
            try:
                read(tmp_path / "a.safetensors", bytes(changed))
                outcomes[True] += 1
            except ModelError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 50, "letters of names may change, digits may not"


def head(header: Any) -> bytes:
    return safetensors_header(header) + bytes(64)


def raw(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(64)


HUGE = 1 << 62
LIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too short"),
    "header length": (struct.pack("<Q", HUGE) + bytes(64), f"a header of {HUGE} bytes"),
    "header beyond the end": (struct.pack("<Q", 500) + bytes(64), "a header of 500 bytes"),
    "no JSON": (raw(b"{" + bytes(9)), "is not JSON"),
    "no text": (raw(b'{"\xff": 1}'), "is not JSON"),
    "no object": (raw(b"[1]"), "no JSON object"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), "is not JSON"),
    "long number": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "is not JSON"),
    "a name twice": (raw(b'{"a": 1, "a": 2}'), "the key 'a' comes twice"),
    "not a number": (raw(b'{"a": NaN}'), "NaN is no number"),
    "no entry": (head({"a": 1}), "is not described"),
    "more keys": (head({"a": {**entry(), "device": "cpu"}}), "is not described"),
    "type": (head({"a": entry("I8")}), "has dtype 'I8'; F32, F16, BF16 are read"),
    "double": (head({"a": entry("F64")}), "has dtype 'F64'"),
    "type a list": (head({"a": entry(["F32"])}), "has dtype"),
    "negative size": (head({"a": entry(shape=[-2, -3])}), "a shape that no weight has"),
    "truth as size": (head({"a": entry(shape=[True, 6])}), "a shape that no weight has"),
    "float as size": (head({"a": entry(shape=[2.0, 3])}), "a shape that no weight has"),
    "zero size": (head({"a": entry(shape=[0, 6], offsets=[0, 0])}), "a shape that no weight has"),
    "dimensions": (head({"a": entry(shape=[1] * 9)}), "a shape that no weight has"),
    "product wraps": (head({"a": entry(shape=[1 << 32, 1 << 32, 1 << 32])}), "takes 24 bytes"),
    "size": (head({"a": entry(shape=[2, 4])}), "takes 24 bytes; [2, 4] of F32 takes 32"),
    "offsets": (head({"a": entry(offsets=[0])}), "no two offsets"),
    "offset backwards": (head({"a": entry(offsets=[24, 0])}), "takes -24 bytes"),
    "offset below": (head({"a": entry(offsets=[-24, 0])}), "no two offsets"),
    "offset beyond": (head({"a": entry(offsets=[HUGE - 24, HUGE])}), "no two offsets"),
    "behind the end": (head({"a": entry(offsets=[64, 88])}), "an overlap or a hole"),
    "hole": (head({"a": entry(), "b": entry(offsets=[40, 64])}), "an overlap or a hole"),
    "overlap": (head({"a": entry(), "b": entry(offsets=[8, 32])}), "an overlap or a hole"),
    "the same place": (head({"a": entry(), "b": entry()}), "an overlap or a hole"),
    "more than the file": (head({"a": entry(shape=[2, 300], offsets=[0, 2400])}), "the tensors end at"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused(case: str, tmp_path: Path) -> None:
    data, message = LIES[case]
    assert message in refused(tmp_path / "a.safetensors", data)


def test_caps(tmp_path: Path) -> None:
    data, place = good_file(), tmp_path / "a.safetensors"
    assert "are read" in refused(place, data, Caps(header_bytes=100))
    assert "3 tensors" in refused(place, data, Caps(tensors=2))


def test_many_keys_of_which_one_comes_twice_take_no_time() -> None:
    keys = ",".join(f'"k{n}":0' for n in range(200_000))
    start = time.monotonic()
    with pytest.raises(ModelError, match="the key 'k7' comes twice"):
        parse_object(f'{{{keys},"k7":1}}'.encode(), "header")
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0xFF800000])
def test_values_that_are_no_numbers_are_refused(bits: int, tmp_path: Path) -> None:
    data = bytearray(good_file())
    data[-34:-30] = struct.pack("<I", bits)
    assert "holds NaN or infinity" in refused(tmp_path / "a.safetensors", bytes(data))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name, word in (
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
        ("none", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=word):
            SafetensorsFile(tmp_path / f"{name}.safetensors")


def edited(folder: Path, name: str, **changes: Any) -> Path:
    """Change keys of a JSON file in a folder."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_folders_that_are_incomplete_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    folder = write_checkpoint(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights"):
        open_checkpoint(folder)
    folder = write_checkpoint(tmp_path / "b", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match="00002-of-00003"):
        open_checkpoint(folder)


INDICES: dict[str, tuple[Any, str]] = {
    "no map": (None, "no weight_map"),
    "a list": ([], "no weight_map"),
    "numbers": ({"model.norm.weight": 1}, "no weight_map"),
    "a path upwards": ({"model.norm.weight": "../model.safetensors"}, "is no name"),
    "an absolute path": ({"model.norm.weight": "/etc/model.safetensors"}, "is no name"),
    "another ending": ({"model.norm.weight": "model.bin"}, "is no name"),
    "a zero byte": ({"model.norm.weight": "a\0.safetensors"}, "is no name"),
    "many files": ({f"t{n}": f"{n}.safetensors" for n in range(5000)}, "5000 files"),
    "elsewhere": ({"model.norm.weight": "model-00001-of-00002.safetensors"}, "where the index has it"),
}


@pytest.mark.parametrize("case", INDICES)
def test_indices_that_lie_are_refused(case: str, tmp_path: Path) -> None:
    places, message = INDICES[case]
    folder = edited(write_checkpoint(tmp_path, shards=2), "model.safetensors.index.json", weight_map=places)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    assert message in caught.value.what


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"num_hidden_layers": 3}, "no tensor 'model.layers.2"),
    "too many": ({"num_hidden_layers": 1}, "no place for tensor 'model.layers.1"),
    "a head of its own": ({"tie_word_embeddings": False}, "no tensor 'lm_head.weight'"),
    "another shape": ({"intermediate_size": 97}, "has shape (96, 64); config.json says (97, 64)"),
    "other heads": ({"num_attention_heads": 8}, "has shape (32, 64); config.json says (16, 64)"),
    "biases": ({"attention_bias": True}, "no tensor 'model.layers.0.self_attn.q_proj.bias'"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_the_configurations_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = TENSORS[case]
    folder = edited(write_checkpoint(tmp_path), "config.json", **changes)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder)
    assert message in caught.value.what


def test_tensors_that_would_change_the_function_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, CheckpointSizes(extra={"attention_bias": True}))
    edited(folder, "config.json", attention_bias=False)
    with pytest.raises(ModelError, match=r"no place for tensor .*bias' \(8 such\)"):
        open_checkpoint(folder)


def test_mutated_configurations_are_read_or_refused(tmp_path: Path) -> None:
    good = json.dumps(CheckpointSizes().config()).encode()
    random = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(600):
        changed = bytearray(good)
        changed[int(random.integers(len(good)))] = int(random.integers(256))
        (tmp_path / "config.json").write_bytes(changed)
        try:
            read_config(tmp_path)
            outcomes[True] += 1
        except BitwrightError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 50
