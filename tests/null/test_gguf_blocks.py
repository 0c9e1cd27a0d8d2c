"""Block formats: ggml's bytes, and rounding that is better than the plain rule."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.gguf import types
from bitwright.compiler.gguf.bit_planes import (
    pack,
    pack_scale_min,
    pack_six_bits,
    unpack,
    unpack_scale_min,
    unpack_six_bits,
)
from bitwright.compiler.gguf.blocks import FORMATS, Codes, Format, decode, encode
from bitwright.compiler.gguf.rounding import dequantize, quantize, square_error
from bitwright.compiler.gguf.types import TensorType

KINDS = list(FORMATS)
# Elements 0, 1, 17 and the last of the block whose byte i is 37 i + 11 modulo 256, and the start of the SHA-256 of all
# of them, as float32, little endian; made by the dequantization of the gguf package 0.19.
GOLDEN = {
    "Q8_0": ("80d32b41009f76410052dac00010c2c0", "a10596672f6f4dba"),
    "Q4_0": ("0010c2be0060813e006001be00000000", "8ccadbca5b31f1be"),
    "Q5_0": ("008c913f006081be000000000060013e", "25855bbe238359fa"),
    "Q4_1": ("e5a14a4781a04a4784a14a4784a14a47", "e0db2b9dab6fa295"),
    "Q5_1": ("67a24a4708a34a47a2a04a47a2a04a47", "d97eb41664da284b"),
    "IQ4_NL": ("00818dc000264a4000b8a1bf0060013e", "8113ae07dbbea0f1"),
    "Q2_K": ("00fb97c200000080007825ba96125dc1", "e3d434cc13cc5a40"),
    "Q3_K": ("806bbcc4003afb4400e014c5006643c4", "bd7a285302575250"),
    "Q4_K": ("d47621ca807721ca807721cabd9eddc9", "54adb56e85d482b4"),
    "Q5_K": ("d97521ca807721ca807721ca819eddc9", "72ba76903e0f21e5"),
    "Q6_K": ("689737c500975945006083440054f6c2", "47110af8b08327ad"),
}


def name_of(kind: TensorType) -> str:
    return kind.name


def matrix(rows: int = 24, columns: int = 512, seed: int = 0) -> np.ndarray:
    """Return weights with the heavy tails of trained ones."""
    return (np.random.default_rng(seed).standard_t(5, (rows, columns)) * 0.05).astype(np.float32)


def importances(columns: int = 512) -> np.ndarray:
    return np.exp(np.random.default_rng(1).normal(size=columns) * 1.5)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_a_blocks_bytes_mean_what_ggml_reads_in_them(kind: TensorType) -> None:
    block = ((np.arange(kind.bytes) * 37 + 11) % 256).astype(np.uint8)[None]
    values = dequantize(block, kind)
    some, digest = GOLDEN[kind.name]
    assert values[0, [0, 1, 17, -1]].astype("<f4").tobytes().hex() == some
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest().startswith(digest)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_dequantization_equals_the_gguf_packages_bit_for_bit(kind: TensorType) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    random = np.random.default_rng(3)
    stored = random.integers(0, 256, (300, kind.bytes), dtype=np.uint8)
    ours = dequantize(stored, kind)
    with np.errstate(all="ignore"):
        theirs = package.quants.dequantize(stored, package.GGMLQuantizationType[kind.name])
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert (kind.block, kind.bytes) == package.GGML_QUANT_SIZES[package.GGMLQuantizationType(kind.number)]


def random_codes(fmt: Format, count: int = 40) -> Codes:
    random = np.random.default_rng(5)
    levels = random.integers(fmt.low, fmt.high + 1, (count, fmt.type.block)).astype(np.int32)
    scale = random.integers(fmt.scale[0], fmt.scale[1] + 1, (count, fmt.groups)).astype(np.int32)
    offset = random.integers(0, fmt.offset + 1, (count, fmt.groups)).astype(np.int32)
    d, dmin = (random.standard_normal(count).astype(np.float16).astype(np.float32) for _ in range(2))
    return Codes(d, dmin, scale, offset, levels)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "IQ4_NL"], ids=name_of)
def test_codes_come_back_from_their_bytes(kind: TensorType) -> None:
    fmt = FORMATS[kind]
    codes = random_codes(fmt)
    shape = (-1, fmt.groups, fmt.group)
    expected = (codes.d[:, None] * codes.scale)[..., None] * codes.level.reshape(shape).astype(np.float32)
    if fmt.added:
        expected = expected + codes.dmin[:, None, None]
    elif fmt.offset:
        expected = expected - (codes.dmin[:, None] * codes.offset)[..., None]
    found = decode(fmt, encode(fmt, codes)).reshape(expected.shape)
    # The same float32 operations, so equality is exact.
    assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("bits", "run"), [(1, 1), (1, 32), (2, 32), (4, 16), (4, 32), (4, 64), (2, 4), (4, 8)]
)
def test_packing_is_undone(bits: int, run: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (7, 8 // bits * run * 3), dtype=np.uint8)
    assert np.array_equal(unpack(pack(codes, bits, run), bits, run), codes)


def test_packed_scales_are_undone() -> None:
    random = np.random.default_rng(0)
    scales, mins = (random.integers(0, 64, (50, 8), dtype=np.uint8) for _ in range(2))
    found = unpack_scale_min(pack_scale_min(scales, mins))
    assert np.array_equal(found[0], scales) and np.array_equal(found[1], mins)
    six = random.integers(0, 64, (50, 16), dtype=np.uint8)
    assert np.array_equal(unpack_six_bits(pack_six_bits(six)), six)


@pytest.mark.parametrize("kind", [types.Q8_0, types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1], ids=name_of)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_block_is_worse_than_the_reference_quantizers(kind: TensorType, seed: int) -> None:
    package = pytest.importorskip("gguf", reason="the gguf package is not installed")
    weights = matrix(seed=seed)
    theirs = package.quants.quantize(weights, package.GGMLQuantizationType[kind.name])
    blocks = (-1, kind.block)

    def errors(stored: np.ndarray) -> np.ndarray:
        return ((dequantize(stored, kind) - weights) ** 2).reshape(blocks).sum(axis=1)

    ours, reference = errors(quantize(weights, kind)), errors(theirs)
    # The reference's scale is among those tried; codes that lie within a rounding of a tie may differ.
    assert (ours <= reference * (1 + 1e-4)).all()
    assert ours.sum() < 0.95 * reference.sum()


# Signal over noise of heavy-tailed weights, in dB, that ggml's own quantizers reach on this matrix' distribution with
# an importance of each column (measured with ggml 0.25's ggml_quantize_chunk on 256 rows): ours must be above.
GGML_WEIGHTED_DB = {
    "Q8_0": 43.3, "Q4_0": 19.9, "Q5_0": 25.9, "Q4_1": 22.6, "Q5_1": 28.9, "IQ4_NL": 21.7, "Q2_K": 11.7, "Q3_K": 15.9,
    "Q4_K": 22.4, "Q5_K": 28.2, "Q6_K": 34.0,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_importance_lowers_the_weighted_error(kind: TensorType) -> None:
    weights = matrix(64)
    share = np.exp(np.random.default_rng(0).normal(size=512))
    weighted = square_error(weights, quantize(weights, kind, share), kind, share)
    plain = square_error(weights, quantize(weights, kind), kind, share)
    signal = float((weights.astype(np.float64) ** 2).sum(axis=0) @ share)
    assert weighted < plain
    assert 10 * np.log10(signal / weighted) > GGML_WEIGHTED_DB[kind.name]


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_awkward_blocks_survive(kind: TensorType) -> None:
    columns = kind.block
    rows = np.zeros((8, columns), np.float32)
    rows[1] = 0.25
    rows[2] = -3.0
    rows[3, 5] = 1e4
    rows[4] = 1e-30
    rows[5] = np.linspace(-1, 1, columns)
    rows[6, ::2] = 1.0
    rows[7] = np.float32(1e-41)
    found = dequantize(quantize(rows, kind), kind)
    assert np.isfinite(found).all()
    assert not found[0].any()
    # A constant is met to half a step of a grid that has it as its end, or better.
    assert np.abs(found[1] - 0.25).max() <= 0.25 / 16
    assert abs(found[3, 5] / 1e4 - 1) < 0.05
    assert np.abs(found[4]).max() < 1e-6
    assert np.abs(found[5] - rows[5]).max() <= 0.5 * 2 / (4 if kind.name == "Q2_K" else 6)


def test_columns_that_calibration_never_saw_are_not_free() -> None:
    weights, share = matrix(4), np.ones(512)
    share[:256] = 0
    found = dequantize(quantize(weights, types.Q4_0, share), types.Q4_0)
    assert np.abs(found[:, :256] - weights[:, :256]).max() < np.abs(weights).max() / 6
    assert np.array_equal(quantize(weights, types.Q4_0, np.zeros(512)), quantize(weights, types.Q4_0)), (
        "no importance at all is the same importance everywhere"
    )


def test_threads_change_nothing() -> None:
    weights = matrix(300)
    assert np.array_equal(quantize(weights, types.Q4_K, threads=3), quantize(weights, types.Q4_K))


def test_large_and_infinite_weights_are_refused() -> None:
    for bad, kind in ((np.inf, types.Q4_K), (np.nan, types.F32), (1e38, types.Q8_0), (1e6, types.F16)):
        weights = np.ones((2, 256), np.float32)
        weights[1, 3] = bad
        with pytest.raises(ModelError):
            quantize(weights, kind)


def test_short_rows_fall_back_as_in_llama_cpp() -> None:
    fallen = {t.name: types.fitting(t, 192).name for t in types.TYPES if not t.fits(192)}
    assert fallen == {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    assert types.fitting(types.Q4_0, 20) is types.F16
    assert types.fitting(types.Q4_K, 20) is types.F16


def test_unknown_types_name_the_nearest() -> None:
    assert types.tensor_type("q4_k") is types.Q4_K
    with pytest.raises(UsageError, match="Q5_K"):
        types.tensor_type("Q5K")
