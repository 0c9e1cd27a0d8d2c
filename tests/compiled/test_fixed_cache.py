"""Decoders that generate: attention kernels over caches written in place, and the artifact that keeps them."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from decoder_bundle import CONTEXT, PIECES, SIZES, decoder_options, sequences
from test_c_runtime import build
from test_c_runtime import run as run_program
from tvm.runtime.vm import VirtualMachine

import bitwright
from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.decoder import CompiledDecoder, pieces
from bitwright.compiler.bundle.native import NativeModel
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.decoding.perplexity import negative_log_likelihood
from bitwright.compiler.errors import BitwrightError, DataError, ModelError, UsageError
from bitwright.compiler.fixed_cache import leave_room
from bitwright.compiler.interpret.attention import allowed_difference, cached_attention
from bitwright.compiler.lower.compile import compile_module
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.program.ops import CachedAttention, Program, Tensor
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

# What ends a text goes with the decoder; here it is no token that the model has.
STOP = '{"eos_token_id": 999}'
NAMES = ("query", "key", "value", "last", "keys", "values")
# length, heads, heads of keys, width, capacity: single tokens and several; widths of whole vectors, of half ones and of
# neither; one head of keys for all and one for each; more positions than fill a vector of scores, and fewer.
SHAPES = [
    (1, 6, 2, 32, 70),
    (5, 6, 2, 32, 70),
    (1, 8, 8, 64, 40),
    (3, 3, 1, 24, 9),
    (2, 2, 2, 20, 33),
    (16, 4, 1, 128, 600),
    (9, 8, 4, 64, 150),
]
# Of what the reference allows: the compiled sums are float32 with few terms, the bound is for thousands.
USUAL_SHARE = 0.1


def attention(
    shape: tuple[int, int, int, int, int], window: int | None = None
) -> tuple[CachedAttention, Program]:
    length, heads, key_heads, width, capacity = shape
    angles = np.arange(capacity)[:, None] * 100.0 ** -np.linspace(0, 1, width // 2)
    step = CachedAttention(
        name="attention",
        inputs=NAMES,
        outputs=("y", "new_keys", "new_values"),
        heads=heads,
        key_heads=key_heads,
        width=width,
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
        window=window,
    )
    rows, cache = (1, length, key_heads * width), (1, key_heads, capacity, width)
    query = (1, length, heads * width)
    shapes = dict(
        zip(
            (*NAMES, *step.outputs), (query, rows, rows, (1,), cache, cache, query, cache, cache), strict=True
        )
    )
    tensors = {n: Tensor(n, s, "int32" if n == "last" else "float32") for n, s in shapes.items()}
    return step, Program(NAMES, step.outputs, (step,), tensors)


@pytest.mark.parametrize(
    ("shape", "target", "window"),
    [
        *((shape, "host", None) for shape in SHAPES),
        (SHAPES[1], "x86-avx2", None),
        (SHAPES[4], "x86-avx2", None),
        # A window within a vector, one of several tiles, one that most calls do not fill; rows and blocks of queries.
        (SHAPES[1], "host", 3),
        (SHAPES[3], "host", 2),
        (SHAPES[5], "host", 100),
        (SHAPES[6], "host", 7),
        (SHAPES[6], "x86-avx2", 41),
    ],
    ids=str,
)
def test_the_kernel_computes_the_reference_and_writes_in_place(
    shape: tuple[int, int, int, int, int], target: str, window: int | None
) -> None:
    step, program = attention(shape, window)
    profile = load_profile(target)
    reason = backend_for(profile.family).why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    backend = backend_for(profile.family)
    module = build_module(program, profile, backend.dot_kernel).ir_module
    machine = VirtualMachine(compile_module(module, backend.tvm_target(profile)), tvm.cpu())
    length, *_, capacity = shape
    random = np.random.default_rng(0)
    # Behind the capacity, and before the beginning, nothing may be touched that is not there.
    for past in (0, 1, capacity // 2, capacity - length, capacity - 1, capacity + 3, -2):
        shapes = [program.tensor(name).shape for name in NAMES]
        arrays = [random.normal(size=s).astype(np.float32) for s in shapes]
        arrays[3] = np.array([past + length - 1], np.int32)
        expected = cached_attention(step, tuple(arrays))
        given = [tvm.runtime.tensor(a) for a in arrays]
        found = [t.numpy() for t in machine["main"](*given)]
        bound = USUAL_SHARE * allowed_difference(tuple(arrays))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=bound)
        np.testing.assert_array_equal(given[4].numpy(), found[1])
        np.testing.assert_array_equal(given[5].numpy(), found[2])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "generation_config.json").write_text(STOP)
    made = compile_model(decoder_options(folder))
    assert made is not None
    return made


def reference_logits(bundle: Bundle, ids: np.ndarray) -> np.ndarray:
    """Return the logits of a sequence, computed by model.onnx in ONNX Runtime token by token."""
    rules, found = bundle.rules, []
    assert rules is not None
    caches = {p.name: np.zeros(p.dims, np.float32) for p in rules.inputs[2:]}
    for past in range(len(ids)):
        feeds = {"ids": ids[None, past : past + 1], "past_length": np.array([past], np.int32), **caches}
        logits, *presents = bundle.run(feeds, "ort").values()
        caches = dict(zip(caches, presents, strict=True))
        found.append(logits[0, 0])
    return np.stack(found)


def test_every_function_is_verified(bundle: Bundle) -> None:
    result = verify(bundle.path)
    assert result.passed and result.executed == "native"
    assert {data.inputs["ids"].shape[1] for data in bundle.golden()} == set(PIECES)
    assert result.bounded == SIZES.layers * result.sets
    # Caches are no answers: what is written there, attention has read.
    assert {o.output for o in result.outputs} == {"scores"}


needs_linux = pytest.mark.skipif(
    platform.system() != "Linux", reason="artifacts of this machine run under Linux"
)


@needs_linux
def test_a_prompt_and_tokens_behind_it(bundle: Bundle) -> None:
    ids = np.random.default_rng(9).integers(0, SIZES.vocabulary, CONTEXT)
    expected = reference_logits(bundle, ids)
    # Both round activations to 8 bits; a float island's last bit may move one rounding by a step.
    bound = 0.02 * np.ptp(expected)
    decoder = CompiledDecoder(bundle, threads=1)
    np.testing.assert_allclose(decoder.logits(ids[:23]), expected[:23], atol=bound)
    for k in range(23, 30):
        np.testing.assert_allclose(decoder.feed(ids[k : k + 1]), expected[k], atol=bound)
    np.testing.assert_allclose(decoder.feed(ids[30:]), expected[-1], atol=bound)
    assert decoder.length == decoder.capacity == CONTEXT
    decoder.restart(23)  # tokens are taken back, and others written over them
    np.testing.assert_allclose(decoder.logits(ids[23:40]), expected[23:40], atol=bound)
    decoder.close()


@needs_linux
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_a_program_generates_without_python(bundle: Bundle, tmp_path: Path) -> None:
    source = Path(__file__).with_name("generate_driver.cc")
    include = f"-I{bundle.path / 'lib' / 'include'}"
    program = build(bundle.path / "lib", tmp_path / "generate", source, include, "-ltiny")
    prompt = [5, 40, 7, 13, 2]
    *printed, refused = run_program(program, 12, *prompt).splitlines()
    decoder, expected = CompiledDecoder(bundle, threads=1), []
    logits = decoder.feed(prompt)
    for _ in range(12):
        expected.append(int(logits.argmax()))
        logits = decoder.feed(expected[-1:])
    assert [int(line) for line in printed] == expected
    assert refused == "4 1 positions behind 48 do not fit caches of 48"


@needs_linux
def test_calls_do_not_depend_on_how_a_text_is_cut(bundle: Bundle) -> None:
    """The integer kernels of all functions compute rows alike, so padding and cutting leave the logits equal."""
    ids = np.random.default_rng(5).integers(0, SIZES.vocabulary, 21)
    decoder = CompiledDecoder(bundle, threads=1)
    whole = decoder.logits(ids)
    for cut in (1, 3, 7):
        decoder.restart()
        parts = [decoder.logits(ids[k : k + cut]) for k in range(0, len(ids), cut)]
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=0.02 * np.ptp(whole))


@needs_linux
def test_the_verbs_take_the_artifact(bundle: Bundle, tmp_path: Path) -> None:
    decoder = CompiledDecoder(bundle, threads=1)
    prompt = (1, 2, 3)
    token, expected = int(decoder.feed(prompt).argmax()), []
    while len(expected) < 8:
        expected.append(token)
        token = int(decoder.feed([token]).argmax())
    found = bitwright.generate(bundle.path, tokens=prompt, max_tokens=8)
    assert found.tokens == tuple(expected) and found.cached and found.reason == "length"
    assert bitwright.generate(bundle.path, tokens=prompt, max_tokens=99).reason == "context"
    assert (bundle.path / "generation_config.json").read_text() == STOP
    stream = np.random.default_rng(6).integers(0, SIZES.vocabulary, 41)
    np.savez(tmp_path / "tokens.npz", tokens=stream)
    value = bitwright.evaluate(bundle.path, f"perplexity:{tmp_path / 'tokens.npz'},window=20").perplexity
    losses = [
        negative_log_likelihood(reference_logits(bundle, part[:-1]), part[1:])
        for part in (stream[:21], stream[20:])
    ]
    # Rounded activations of single positions may differ by a step, as above; the mean of forty hides most of it.
    assert value is not None and value.tokens == 40
    assert value.nll == pytest.approx(float(np.mean(losses)), rel=0.02)


@needs_linux
def test_what_the_caches_cannot_hold_is_refused(bundle: Bundle) -> None:
    decoder = CompiledDecoder(bundle, threads=1)
    decoder.feed(range(20))
    for tokens, message in (
        (range(29), "29 tokens behind 20, where the caches hold 48"),
        ([], "0 tokens"),
        ([SIZES.vocabulary], "token 48 is none of the 48"),
        ([-1], "token -1 is none"),
    ):
        with pytest.raises(DataError, match=message):
            decoder.feed(tokens)
    assert decoder.length == 20
    with pytest.raises(DataError, match="21 of 20 tokens"):
        decoder.restart(21)
    model = NativeModel(bundle.path / "lib")
    ids = np.zeros((1, 5), np.int64)
    for past in (44, -1, 2**31 - 1):
        with pytest.raises(DataError, match=f"5 positions behind {past} do not fit caches of 48"):
            model.run([ids, np.array([past], np.int32)])
    with pytest.raises(DataError, match="expected elements of type int32"):
        model.run([ids, np.array([0], np.int64)])
    with pytest.raises(DataError, match="T=9 is larger than the largest bucket"):
        model.run([np.zeros((1, 9), np.int64), np.array([0], np.int32)])
    sample = next(iter(bundle.golden())).inputs
    with pytest.raises(DataError, match="behind 48 do not fit caches of 48"):
        bundle.run({**sample, "past_length": np.array([48], np.int32)})


@pytest.mark.parametrize("count", range(1, 70))
def test_a_prompt_is_cut_into_pieces_that_functions_hold(count: int) -> None:
    found = pieces(count, (1, 8, 32))
    assert sum(found) == count and all(0 < n <= 32 for n in found)
    assert len(found) <= -(-count // 32) + 4


def test_options_that_mean_nothing_for_such_a_decoder_are_refused(tmp_path: Path) -> None:
    for changes, error, message in (
        ({"dynamic": "T"}, UsageError, "takes no --dynamic"),
        ({"dims": {"T": 4}, "buckets": {}}, UsageError, "takes no --dim"),
        ({"context": 1}, UsageError, "hold no text"),
        ({"context": 65}, UsageError, "table holds 64 positions"),
        ({"buckets": {"N": (2,)}}, UsageError, "varies in 'T' alone"),
        ({"buckets": {"T": (31,)}}, DataError, "no sequence of the data has 31 tokens"),
        ({"buckets": {"T": (8, 30)}, "context": 34}, UsageError, "34 positions no room to try the others"),
        ({"buckets": {}, "data": sequences(2, 9)}, DataError, "sequences of at most 9 tokens"),
        ({"data": {"ids": sequences()["ids"] + 40}}, DataError, "is none of the model's 48 tokens"),
        ({"target": "cortex-m7"}, UsageError, "no runtime that could choose"),
        ({"data": None, "random_data": True}, UsageError, "random tokens"),
    ):
        with pytest.raises(error, match=message):
            compile_model(decoder_options(tmp_path, **changes))


def test_pieces_leave_room_to_try_each_of_them() -> None:
    # 16 tokens, then one behind them that is padded to the largest piece.
    assert not leave_room((1, 16, 64), 79) and leave_room((1, 16, 64), 80)
    assert leave_room((1, 64), 64) and leave_room((1,), 1)


def test_what_quantize_has_written_is_refused(tmp_path: Path) -> None:
    options = decoder_options(tmp_path)
    file, data = tmp_path / "quantized.onnx", tmp_path / "tokens.npz"
    np.savez(data, ids=sequences()["ids"].ravel())
    words = f"{data}:ids,window=16"
    bitwright.quantize(options.model, target="host", data=words, recipe="w4-nearest", output=file, gate=False)
    with pytest.raises(ModelError, match=r"quantized already: '.*' \(DequantizeLinear\)"):
        compile_model(replace(options, model=file))


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    from small_bundle import feeds, model

    from bitwright.compiler.graph.saving import save_model

    save_model(model(), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="not a decoder"):
        compile_model(
            Options(
                model=tmp_path / "model.onnx",
                target="host",
                data=[feeds(0)],
                output=tmp_path / "o",
                context=16,
            )
        )


@needs_linux
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cache 1 0 48", "cache 7 0 48", "a line is damaged"),
        ("cache 1 0 48", "cache 0 0 48", "a line is damaged"),
        ("cache 1 0 48", "cache 1 3 48", "a line is damaged"),
        ("cache 1 0 48\n", "", "a line is damaged"),
        ("float32 - 4 1 2 48 16", "float32 - 4 1 2 $0 16", "a line is damaged"),
        ("float32 - 4 1 2 48 16", "float32 - 4 1 2 99999999999 99999999999", "a line is damaged"),
        ("float32 - 4 1 2 48 16", "float32 - 4 1 2 8 16", "mismatch"),
    ],
)
def test_a_damaged_description_of_caches_is_refused(
    bundle: Bundle, tmp_path: Path, old: str, new: str, message: str
) -> None:
    for file in (bundle.path / "lib").glob("*.so"):
        (tmp_path / file.name).symlink_to(file)
    text = (bundle.path / "lib" / "model.txt").read_text()
    assert old in text
    (tmp_path / "model.txt").write_text(text.replace(old, new, 1))
    with pytest.raises(BitwrightError, match=message):
        NativeModel(tmp_path).run([np.zeros((1, 1), np.int64), np.zeros(1, np.int32)])
