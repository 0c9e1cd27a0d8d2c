"""GGUF files made to hurt: cut off, mutated, lying about counts; and tokenizers and decoders that are none."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitwright.compiler.errors import BitwrightError, DataError, ModelError
from bitwright.compiler.gguf import types
from bitwright.compiler.gguf.reader import Caps, GgufFile
from bitwright.compiler.gguf.rounding import quantize
from bitwright.compiler.gguf.values import Typed, ValueType, int32s, string_bytes, text, texts, uint32
from bitwright.compiler.gguf.writer import PlannedTensor, write_gguf
from bitwright.compiler.to_gguf.tokenizer import read_tokenizer

from .refusals import cheap_refusal


def good_file() -> bytes:
    """Return a small file with a bit of everything."""
    planned = [PlannedTensor("a.weight", types.Q4_0, (2, 32)), PlannedTensor("b", types.F32, (3,))]
    metadata = {
        "general.architecture": text("llama"),
        "n": uint32(3),
        "tokens": texts(["x", "yz"]),
        "kinds": int32s([1, 2]),
        "flag": Typed(ValueType.BOOL, True),
    }
    stream = io.BytesIO()
    write_gguf(
        stream, metadata, planned, lambda t: quantize(np.ones(t.shape).reshape(-1, t.shape[-1]), t.kind)
    )
    return stream.getvalue()


def read(path: Path, data: bytes, caps: Caps | None = None) -> None:
    """Read a file and all of its tensors."""
    path.write_bytes(data)
    with GgufFile(path, caps or Caps()) as file:
        for name in file.tensors:
            file.array(name)


def refused(path: Path, data: bytes, caps: Caps | None = None) -> str:
    """Return the message of a refusal."""
    with cheap_refusal() as caught:
        read(path, data, caps)
    return str(caught.value)


def header(tensors: int, entries: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + body


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string_bytes(key) + struct.pack("<I", kind) + value


def tensor(
    dims: list[int], number: int = 0, offset: int = 0, name: str = "w", count: int | None = None
) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims) if count is None else count, *dims)
    return string_bytes(name) + shape + struct.pack("<IQ", number, offset)


def test_every_truncation_is_refused_with_its_place(tmp_path: Path) -> None:
    data = good_file()
    read(tmp_path / "a.gguf", data)
    end = len(data) - 20  # the last 20 bytes are padding behind 12 bytes of data
    for length in range(end):
        assert "a.gguf" in refused(tmp_path / "a.gguf", data[:length]), length


def test_any_mutated_byte_is_read_or_refused(tmp_path: Path) -> None:
    data = good_file()
    start = data.index(b"GGUF")
    random = np.random.default_rng(0)
    survived = 0
    for at in range(start, 320):
        for value in (data[at] ^ 1, data[at] ^ 0x80, int(random.integers(256))):
            changed = bytearray(data)
            changed[at] = value
            try:
                read(tmp_path / "a.gguf", bytes(changed))
                survived += 1
            except ModelError:
                pass
    assert survived > 100, "letters of names may change"


def test_random_bytes_behind_a_good_start(tmp_path: Path) -> None:
    random, refusals = np.random.default_rng(1), set[str]()
    for _ in range(300):
        junk = random.integers(0, 256, int(random.integers(8, 200)), dtype=np.uint8).tobytes()
        small = header(int(random.integers(4)), int(random.integers(4)), junk)
        try:
            read(tmp_path / "a.gguf", small + bytes(64) if random.integers(2) else small)
        except ModelError as error:
            refusals.add(error.what)
    assert len(refusals) > 20, "they fail in many ways"


HUGE = 1 << 62
LIES: dict[str, tuple[bytes, str]] = {
    "no magic": (b"GGML" + bytes(40), "does not start with 'GGUF'"),
    "version 1": (header(0, 0, bytes(8), 1), "version 1 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
    "tensors": (header(HUGE, 0, bytes(40)), "tensors are more than the file can hold"),
    "entries": (header(0, HUGE, bytes(40)), "metadata entries are more than the file can hold"),
    "key length": (header(0, 1, struct.pack("<Q", HUGE) + bytes(40)), "a key of"),
    "key beyond the end": (header(0, 1, struct.pack("<Q", 500) + bytes(40)), "500 bytes are announced"),
    "string length": (header(0, 1, entry("k", 8, struct.pack("<Q", HUGE) + bytes(9))), "a string of"),
    "array length": (
        header(0, 1, entry("k", 9, struct.pack("<IQ", 0, HUGE) + bytes(9))),
        "elements are more",
    ),
    "strings": (header(0, 1, entry("k", 9, struct.pack("<IQ", 8, 1 << 20) + bytes(99))), "elements are more"),
    "array of arrays": (header(0, 1, entry("k", 9, struct.pack("<IQ", 9, 1) + bytes(40))), "array of arrays"),
    "unknown kind": (header(0, 1, entry("k", 77, bytes(40))), "unknown metadata type 77"),
    "unknown element": (header(0, 1, entry("k", 9, struct.pack("<IQ", 13, 1) + bytes(40))), "type 13"),
    "no truth": (header(0, 1, entry("k", 7, b"\x02" + bytes(40))), "neither 0 nor 1"),
    "no text": (header(0, 1, entry("k", 8, struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40))), "not UTF-8"),
    "empty key": (header(0, 1, entry("", 0, b"\0" + bytes(40))), "is empty or comes twice"),
    "key twice": (header(0, 2, entry("k", 0, b"\0") * 2 + bytes(40)), "'k' is empty or comes twice"),
    "alignment 0": (header(0, 1, entry("general.alignment", 4, struct.pack("<I", 0)) + bytes(40)), "is 0"),
    "alignment 48": (header(0, 1, entry("general.alignment", 4, struct.pack("<I", 48)) + bytes(40)), "is 48"),
    "alignment huge": (
        header(0, 1, entry("general.alignment", 4, struct.pack("<I", 1 << 31)) + bytes(40)),
        "not a power of two from",
    ),
    "alignment a text": (
        header(0, 1, entry("general.alignment", 8, string_bytes("32")) + bytes(40)),
        "uint32",
    ),
    "no dimensions": (header(1, 0, tensor([]) + bytes(64)), "0 dimensions"),
    "dimensions": (header(1, 0, tensor([1] * 5) + bytes(64)), "5 dimensions"),
    "many dimensions": (header(1, 0, tensor([1], count=1 << 31) + bytes(64)), "2147483648 dimensions"),
    "zero size": (header(1, 0, tensor([4, 0]) + bytes(64)), "cannot have dimensions"),
    "product wraps": (header(1, 0, tensor([1 << 32, 1 << 32, 4]) + bytes(64)), "cannot have dimensions"),
    "product": (header(1, 0, tensor([256, 256, 256, 256]) + bytes(64)), "ends beyond the file"),
    "half a block": (header(1, 0, tensor([33], 2) + bytes(64)), "cannot have dimensions"),
    "unknown type": (header(1, 0, tensor([32], 99) + bytes(64)), "type 99"),
    "removed type": (header(1, 0, tensor([32], 4) + bytes(64)), "type 4"),
    "offset": (header(1, 0, tensor([4], 0, 1 << 63) + bytes(64)), "ends beyond the file"),
    "unaligned": (header(1, 0, tensor([4], 0, 4) + bytes(96)), "is not aligned"),
    "name": (header(1, 0, tensor([4], name="w" * 64) + bytes(64)), "a tensor's name of 64 bytes"),
    "twice": (header(2, 0, tensor([4]) + tensor([4], 0, 32) + bytes(128)), "comes twice"),
    "overlap": (header(2, 0, tensor([16]) + tensor([4], 0, 32, "v") + bytes(256)), "overlap"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused(case: str, tmp_path: Path) -> None:
    data, message = LIES[case]
    found = refused(tmp_path / "a.gguf", data)
    assert message in found
    assert "offset" in found, "the place in the file is named"


def test_a_large_array_of_empty_strings_is_counted_against_the_bytes(tmp_path: Path) -> None:
    body = entry("k", 9, struct.pack("<IQ", 8, 100_000) + bytes(8 * 100_000))
    read(tmp_path / "a.gguf", header(0, 1, body))
    assert "elements are more" in refused(tmp_path / "a.gguf", header(0, 1, body), Caps(elements=99_999))


def test_many_arrays_share_a_cap(tmp_path: Path) -> None:
    body = b"".join(entry(f"k{n}", 9, struct.pack("<IQ", 0, 4000) + bytes(4000)) for n in range(10))
    read(tmp_path / "a.gguf", header(0, 10, body), Caps(elements=40_000))
    assert "elements are more" in refused(tmp_path / "a.gguf", header(0, 10, body), Caps(elements=39_999))


def test_the_header_has_a_cap(tmp_path: Path) -> None:
    body = entry("k", 8, string_bytes("x" * 5000))
    assert "the header is longer" in refused(tmp_path / "a.gguf", header(0, 1, body), Caps(header_bytes=1000))


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["a folder", "an empty file"])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a.gguf")
    with pytest.raises(ModelError):
        GgufFile(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile(tmp_path / "missing.gguf")


def tokenizer(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
    }
    for key, value in changes.items():
        part = found["model"] if key in ("type", "vocab", "merges", "byte_fallback") else found
        part[key] = value
    return found


BAD_TOKENIZERS: dict[str, tuple[Any, str]] = {
    "list": ([], "no JSON object"),
    "no model": ({"pre_tokenizer": None}, "'model' is missing"),
    "unigram": (tokenizer(type="Unigram"), "'Unigram'"),
    "fallback": (tokenizer(byte_fallback=True), "byte fallback"),
    "no vocabulary": (tokenizer(vocab=[]), "'vocab' is missing"),
    "number": (tokenizer(vocab={"a": 4}), "token number 4"),
    "negative": (tokenizer(vocab={"a": -1}), "token number -1"),
    "truth": (tokenizer(vocab={"a": True}), "token number True"),
    "text": (tokenizer(vocab={"a": "1"}), "token number '1'"),
    "added": (tokenizer(added_tokens=["x"]), "token number None"),
    "merge": (tokenizer(merges=["a b c"]), "not a pair"),
    "merge of numbers": (tokenizer(merges=[[1, 2]]), "not a pair"),
    "rule": (tokenizer(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer ['Whitespace']"),
    "pattern": (
        tokenizer(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Split", "pattern": {"Regex": "."}}, {"type": "ByteLevel"}],
            }
        ),
        "none that llama.cpp",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_bad_tokenizers_are_refused(case: str, tmp_path: Path) -> None:
    data, message = BAD_TOKENIZERS[case]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(DataError) as caught:
        read_tokenizer(tmp_path / "tokenizer.json", 4)
    assert message in str(caught.value)


def test_tokenizers_that_are_no_json_are_refused(tmp_path: Path) -> None:
    for raw in (b"{", b"\xff\xfe\x00", b"[" * 200_000):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        with pytest.raises(BitwrightError):
            read_tokenizer(tmp_path / "tokenizer.json", 4)


def test_special_tokens_must_exist(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(DataError, match="'</s>' is no token"):
        read_tokenizer(tmp_path / "tokenizer.json", 4)
