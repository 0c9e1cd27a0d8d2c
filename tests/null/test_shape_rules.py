"""Inputs of any size: which function serves them, how they are padded, what the outputs are cut to."""

from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.bundle.functions import interface_of, merged
from bitwright.compiler.bundle.model_text import model_text
from bitwright.compiler.cli.parsing import parse_buckets, parse_dynamic, parse_pads
from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.options import Options
from bitwright.targets.backend import Execution
from bitwright.targets.toolchain.shape_rules import FunctionRule, PortRule, ShapeRules

SIZES = (4, 8, 16)
RULES = ShapeRules(
    buckets={"T": SIZES},
    loop="N",
    fixed={"N": 1},
    inputs=(
        PortRule(name="ids", dtype="int64", dims=("N", "T"), pad=7.0),
        PortRule(name="scale", dtype="float32", dims=(3,)),
    ),
    outputs=(
        PortRule(name="tokens", dtype="int64", dims=("N", "T", 2)),
        PortRule(name="whole", dtype="int64", dims=("N", 3)),
    ),
    functions=(
        FunctionRule(name="main", sizes={"T": 8}),
        FunctionRule(name="main_1", sizes={"T": 4}),
        FunctionRule(name="main_2", sizes={"T": 16}),
    ),
)


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    ids = np.arange(batch * length, dtype=np.int64).reshape(batch, length) + 100
    return {"ids": ids, "scale": np.ones(3, np.float32)}


@pytest.mark.parametrize("length", range(1, 17))
def test_the_smallest_function_that_holds_the_input_serves_it(length: int) -> None:
    dispatch = RULES.dispatch(feeds(2, length))
    assert dispatch.function.sizes["T"] == min(size for size in SIZES if size >= length)
    assert len(dispatch.calls) == 2
    for number, call in enumerate(dispatch.calls):
        assert call["ids"].shape == (1, dispatch.function.sizes["T"])
        np.testing.assert_array_equal(call["ids"][0, :length], feeds(2, length)["ids"][number])
        assert (call["ids"][0, length:] == 7).all()
        np.testing.assert_array_equal(call["scale"], np.ones(3))


def test_outputs_are_cut_and_joined() -> None:
    dispatch = RULES.dispatch(feeds(3, 5))
    results = [
        {"tokens": np.stack([call["ids"]] * 2, -1), "whole": np.full((1, 3), call["ids"][0, 0])}
        for call in dispatch.calls
    ]
    outputs = RULES.assemble(dispatch.sizes, results)
    np.testing.assert_array_equal(outputs["tokens"], np.stack([feeds(3, 5)["ids"]] * 2, -1))
    np.testing.assert_array_equal(outputs["whole"], np.repeat([[100], [105], [110]], 3, axis=1))


def test_times_of_the_calls_are_added() -> None:
    dispatch = RULES.dispatch(feeds(2, 4))
    results = {"tokens": np.zeros((1, 4, 2), np.int64), "whole": np.zeros((1, 3), np.int64)}
    whole = merged(RULES, dispatch, [Execution(results, (), "native", seconds) for seconds in (0.25, 0.5)])
    assert whole.seconds == 0.75
    assert whole.outputs["whole"].shape == (2, 3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": np.zeros((1, 17), np.int64)}, r"T=17 is larger than the largest bucket; T has \[4, 8, 16\]"),
        ({"ids": np.zeros((1, 0), np.int64)}, r"expected shape \[N, T\], got \[1, 0\]"),
        ({"ids": np.zeros((0, 4), np.int64)}, r"expected shape \[N, T\], got \[0, 4\]"),
        ({"ids": np.zeros((1, 4), np.int32)}, "expected int64, got int32"),
        ({"ids": np.zeros(4, np.int64)}, r"expected shape \[N, T\], got \[4\]"),
        ({"scale": np.ones(4, np.float32)}, r"expected shape \[3\], got \[4\]"),
        ({"other": np.ones(4, np.float32)}, "no input 'other'"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RULES.dispatch({**feeds(1, 4), **changed})


def test_a_dimension_has_one_size() -> None:
    two = ShapeRules(
        **{
            **RULES.model_dump(),
            "inputs": (*RULES.inputs, PortRule(name="mask", dtype="int64", dims=("N", "T"), pad=0.0)),
        }
    )
    with pytest.raises(DataError, match=r"input 'mask': expected shape \[N, T\], got \[1, 5\], with T=4"):
        two.dispatch({**feeds(1, 4), "mask": np.ones((1, 5), np.int64)})


def test_rules_survive_the_disk_and_damage_is_named(tmp_path: Path) -> None:
    assert ShapeRules.read(tmp_path) is None
    RULES.write(tmp_path)
    assert ShapeRules.read(tmp_path) == RULES
    path = tmp_path / "shapes.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(UsageError, match="rules of shapes are damaged"):
        ShapeRules.read(tmp_path)


def test_model_text_of_several_shapes(tmp_path: Path) -> None:
    library = tmp_path / "model.so"
    library.write_bytes(b"Wikipedia")  # its Adler-32 checksum is the usual example, 0x11E60398
    interface = interface_of(RULES, RULES.functions[0], {})
    text = model_text(interface, RULES, flags=("avx2", "fma"), threads=2, library=library)
    assert text.splitlines() == [
        "bitwright-model 1",
        "library model.so 9 300286872",
        "processor avx2 fma",
        "threads 2",
        "dim T bucket 4 8 16",
        "dim N loop",
        "input ids int64 7.0 2 $1 $0",
        "input scale float32 - 1 3",
        "output tokens int64 - 3 $1 $0 2",
        "output whole int64 - 2 $1 3",
        "function main 8 1",
        "function main_1 4 1",
        "function main_2 16 1",
        "end",
    ]


def test_names_cannot_break_the_lines_of_model_text() -> None:
    odd = "a b\n%$\u00e9"
    rules = RULES.model_copy(update={"outputs": (PortRule(name=odd, dtype="int64", dims=("N",)),)})
    text = model_text(interface_of(rules, rules.functions[0], {}), rules, flags=(), threads=1, library=None)
    assert "output a%20b%0A%25%24%C3%A9 int64 - 1 $1\n" in text
    assert text.isascii()


def test_option_values() -> None:
    assert parse_buckets(["T=64,16,16", "a=b=2"]) == {"T": (16, 64), "a=b": (2,)}
    assert parse_pads(["mask=0", "x=-1.5"]) == {"mask": 0.0, "x": -1.5}
    for wrong in ("T", "T=", "=4", "T=0", "T=4,x", "T=-4", "T=1_0", "T=9999999999"):
        with pytest.raises(UsageError, match="positive whole numbers"):
            parse_buckets([wrong])
    for wrong in ("x", "x=", "=1", "x=a", "x=nan", "x=inf"):
        with pytest.raises(UsageError, match="with a number"):
            parse_pads([wrong])
    with pytest.raises(UsageError, match="two lists"):
        parse_buckets(["T=4", "T=8"])
    with pytest.raises(UsageError, match="two values"):
        parse_pads(["x=1", "x=2"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": {"T": (8, 4)}}, "no ascending positive sizes"),
        ({"buckets": {"T": (4,)}, "dims": {"T": 4}}, "named by --dim and by --bucket"),
        ({"buckets": {"T": (4,)}, "loop": "T"}, "named by --bucket and by --loop"),
        ({"pad": {"x": 0.0}}, "only inputs of a model with buckets are padded"),
        ({"static": "my-model"}, "no name for C"),
    ],
)
def test_options_that_contradict_each_other(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(model=Path("m.onnx"), target="host", data="d.npz", **changes)  # type: ignore[arg-type]


DYNAMIC = ShapeRules(
    buckets={"T": (4, 8), "N": (1, 16)},
    loop=None,
    dynamic="N",
    fixed={},
    inputs=RULES.inputs,
    outputs=RULES.outputs,
    functions=tuple(
        FunctionRule(name=f"main_{k}" if k else "main", sizes=sizes)
        for k, sizes in enumerate(
            ({"T": 4, "N": 1}, {"T": 4, "N": 16}, {"T": 8, "N": 1}, {"T": 8, "N": 16}, {"T": 4}, {"T": 8})
        )
    ),
)


@pytest.mark.parametrize(
    ("batch", "length", "sizes"),
    [
        (1, 3, {"T": 4, "N": 1}),
        (16, 8, {"T": 8, "N": 16}),
        (2, 4, {"T": 4}),
        (15, 5, {"T": 8}),
        (17, 1, {"T": 4}),
        (100_000, 4, {"T": 4}),
    ],
)
def test_a_function_of_just_that_size_goes_before_a_dynamic_one(
    batch: int, length: int, sizes: dict[str, int]
) -> None:
    """No batch is padded, and none is too large."""
    dispatch = DYNAMIC.dispatch(feeds(batch, length))
    assert dispatch.function.sizes == sizes and len(dispatch.calls) == 1
    assert dispatch.calls[0]["ids"].shape == (batch, sizes["T"])
    assert DYNAMIC.is_dynamic(dispatch.function) == ("N" not in sizes)


def test_other_dimensions_keep_their_buckets() -> None:
    with pytest.raises(DataError, match=r"T=9 is larger than the largest bucket; T has \[4, 8\]"):
        DYNAMIC.dispatch(feeds(5, 9))


def test_a_dynamic_function_takes_arrays_of_any_batch() -> None:
    dynamic = DYNAMIC.functions[-1]
    interface = interface_of(DYNAMIC, dynamic, {})
    assert interface.inputs[0].shape == (-1, 8) and interface.outputs[1].shape == (-1, 3)
    for batch in (1, 7):
        assert interface.arrange(feeds(batch, 8))[0].shape == (batch, 8)
    with pytest.raises(DataError, match=r"expected shape \[-1, 8\], got \[2, 7\]"):
        interface.arrange(feeds(2, 7))


def test_the_c_runtime_is_told_which_dimension_is_free() -> None:
    interface = interface_of(DYNAMIC, DYNAMIC.functions[0], {})
    lines = model_text(interface, DYNAMIC, flags=(), threads=1, library=None).splitlines()
    assert "dim T bucket 4 8" in lines and "dim N any 1 16" in lines
    assert "function main 4 1" in lines and "function main_5 8 0" in lines


def test_dynamic_rules_are_read_back_and_tried_one_element_at_a_time(tmp_path: Path) -> None:
    DYNAMIC.write(tmp_path)
    assert ShapeRules.read(tmp_path) == DYNAMIC
    one = DYNAMIC.one_at_a_time()
    assert one.loop == "N" and one.dynamic is None and set(one.buckets) == {"T"}
    dispatch = one.dispatch(feeds(3, 5))
    assert dispatch.function.sizes == {"T": 8} and [c["ids"].shape for c in dispatch.calls] == [(1, 8)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": {"N": 1}}, "named by --dim and by --dynamic"),
        ({"loop": "M"}, "'M' is served one element at a time"),
        ({"buckets": {"N": (1, 4)}, "pad": {"x": 0.0}}, "only inputs of a model with buckets are padded"),
    ],
)
def test_options_that_contradict_a_dynamic_dimension(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(model=Path("m.onnx"), target="host", random_data=True, dynamic="N", **changes)  # type: ignore[arg-type]


def test_a_dynamic_dimension_may_have_buckets() -> None:
    Options(model=Path("m.onnx"), target="host", random_data=True, dynamic="N", buckets={"N": (1, 4)})


def test_a_free_dimension_may_have_a_largest_size() -> None:
    assert parse_dynamic(None) == (None, None)
    assert parse_dynamic("N") == ("N", None)
    assert parse_dynamic("T=512") == ("T", 512)
    for wrong in ("T=", "=4", "T=0", "T=-4", "T=1_0", "T=9999999999"):
        with pytest.raises(UsageError, match="not NAME or NAME=SIZE"):
            parse_dynamic(wrong)


LENGTHS = ShapeRules(
    buckets={"T": (8,)},
    loop=None,
    dynamic="T",
    longest=16,
    fixed={"N": 1},
    inputs=(PortRule(name="ids", dtype="int64", dims=(1, "T")),),
    outputs=(PortRule(name="whole", dtype="int64", dims=(1, 3)),),
    functions=(FunctionRule(name="main", sizes={"T": 8}), FunctionRule(name="main_1", sizes={})),
)


@pytest.mark.parametrize("length", range(1, 17))
def test_every_length_up_to_the_longest_is_served_without_padding(length: int) -> None:
    dispatch = LENGTHS.dispatch({"ids": np.ones((1, length), np.int64)})
    assert LENGTHS.has_lengths
    assert LENGTHS.is_dynamic(dispatch.function) == (length != 8)
    assert dispatch.calls[0]["ids"].shape == (1, length)


def test_a_longer_sequence_is_refused_and_the_c_runtime_is_told() -> None:
    with pytest.raises(DataError, match="T=17 is larger than 16, the largest that is served"):
        LENGTHS.dispatch({"ids": np.ones((1, 17), np.int64)})
    assert LENGTHS.words(LENGTHS.functions[1]) == "any T up to 16"
    interface = interface_of(LENGTHS, LENGTHS.functions[0], {})
    text = model_text(interface, LENGTHS, flags=(), threads=1, library=None)
    assert "dim T upto 16 8\n" in text and "function main_1 0\n" in text
