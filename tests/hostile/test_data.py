"""Data that does not fit the model is refused with sample, input and fix; what fits is streamed unchanged."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest.dataset import dataset_from_memory, open_dataset, random_dataset
from bitwright.compiler.ingest.limits import Limits

from .bad_data import IMAGES, images, model, refused, saved
from .memory import takes_at_most

# --- .npz
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_read_sample_by_sample(tmp_path, compressed, order):
    x = images()
    dataset = open_dataset(saved(tmp_path, compressed, x=np.asarray(x, order=order)), model(IMAGES))
    assert len(dataset) == 5
    assert dataset.warnings == ()
    for _ in range(2):
        assert [s["x"].shape for s in dataset] == [(1, 3, 4, 4)] * 5
        np.testing.assert_array_equal(np.concatenate([s["x"] for s in dataset]), x)
    assert [b["x"].shape[0] for b in dataset.batches(2)] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in dataset.batches(3)]), x)


def test_npz_with_one_axis_more_than_the_input(tmp_path):
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    dataset = open_dataset(saved(tmp_path, x=ids), model("int64[4] x"))
    assert [s["x"].tolist() for s in dataset] == ids.tolist()
    assert [b["x"].shape for b in dataset.batches(2)] == [(4,)] * 3


def test_static_batch_is_never_stacked(tmp_path):
    dataset = open_dataset(saved(tmp_path, x=images()), model("float[1, 3, 4, 4] x"))
    assert [b["x"].shape for b in dataset.batches(4)] == [(1, 3, 4, 4)] * 5


def test_two_varying_first_dimensions_are_not_stacked(tmp_path):
    network = model("float[N, 2] x,  float[M, 2] z")
    a = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    path = saved(tmp_path, x=a, z=a)
    assert [b["x"].shape for b in open_dataset(path, network).batches(3)] == [(1, 2)] * 3
    same = model("float[N, 2] x,  float[N, 2] z")
    assert [b["z"].shape for b in open_dataset(path, same).batches(3)] == [(3, 2)]


def test_scalar_input_is_the_same_for_every_sample(tmp_path):
    network = model("float[N, 2] x,  int64 rate")
    path = saved(tmp_path, x=np.eye(2, dtype=np.float32), rate=np.int64(16000))
    assert [int(s["rate"]) for s in open_dataset(path, network)] == [16000, 16000]


def test_labels_are_ignored_with_a_warning(tmp_path):
    dataset = open_dataset(saved(tmp_path, x=images(), labels=np.arange(5)), model(IMAGES))
    assert [w for w in dataset.warnings if "'labels'" in w and "ignored" in w]
    assert list(next(iter(dataset))) == ["x"]


def test_missing_source(tmp_path):
    with pytest.raises(UsageError, match="no such file") as caught:
        open_dataset(tmp_path / "none.npz", model(IMAGES))
    assert caught.value.exit_code == 2


def test_wrong_name(tmp_path):
    refused(
        saved(tmp_path, image=images()),
        model("float[N, 3, 4, 4] images"),
        "'images'",
        "did you mean 'image'?",
    )
    refused(saved(tmp_path, zzz=images()), model(IMAGES), "'x'", "known: zzz")


def test_wrong_dtype(tmp_path):
    message = refused(saved(tmp_path, x=images().astype(np.float64)), model(IMAGES), "array 'x'")
    assert "is float64, the model needs float32" in message
    assert "astype(numpy.float32)" in message


def test_wrong_shape(tmp_path):
    refused(
        saved(tmp_path, x=images()[:, 0]),
        model("float[N, 3, 4, 4, 2] x"),
        "array 'x'",
        "[samples, N, 3, 4, 4, 2]",
    )
    refused(
        saved(tmp_path, x=images()[:, :2]),
        model(IMAGES),
        "sample 0, input 'x'",
        "[1, 2, 4, 4]",
        "float32[N, 3, 4, 4]",
    )
    refused(saved(tmp_path, x=images()), model("float[8, 3, 4, 4] x"), "sample 0, input 'x'", "[1, 3, 4, 4]")


def test_different_sample_counts(tmp_path):
    network = model("float[N, 2] x,  float[N, 2] z")
    a = np.ones((3, 2), np.float32)
    refused(saved(tmp_path, x=a, z=a[:2]), network, "'x' 3, 'z' 2")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_sample_that_is_not_finite(tmp_path, value):
    x = images()
    x[3, 1, 2, 0] = value
    refused(saved(tmp_path, x=x), model(IMAGES), "sample 3, input 'x'", "[0, 1, 2, 0]", str(value))


def test_no_samples(tmp_path):
    refused(saved(tmp_path, x=images(0)), model(IMAGES), "no sample")
    refused(saved(tmp_path, x=np.zeros((2, 0), np.float32)), model("float[N, T] x"), "sample 0", "empty")


def test_constant_samples_are_a_warning(tmp_path):
    dataset = open_dataset(saved(tmp_path, x=np.zeros((4, 3, 4, 4), np.float32)), model(IMAGES))
    assert len(dataset.warnings) == 1 and "input 'x'" in dataset.warnings[0]
    masks = open_dataset(saved(tmp_path, x=np.ones((4, 3, 4, 4), np.int64)), model("int64[N, 3, 4, 4] x"))
    assert masks.warnings == ()


def test_outlier_is_a_warning(tmp_path):
    x = images()
    x[2, 0, 0, 0] = 1e30
    (warning,) = open_dataset(saved(tmp_path, x=x), model(IMAGES)).warnings
    assert "input 'x'" in warning and "sample 2" in warning and "1e+30" in warning
    sparse = np.where(images() > 1.5, images(), 0).astype(np.float32)
    assert open_dataset(saved(tmp_path, x=sparse), model(IMAGES)).warnings == ()


# --- hostile archives
# -------------------------------------------------------------------------------------------


def npy(shape: str, descr: str = "<f4", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def archive(folder: Path, **members: bytes) -> Path:
    path = folder / "bad.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in members.items():
            target.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize(
    "content", [b"", b"not a zip", b"PK\x05\x06" + b"\0" * 18, b"PK\x03\x04" + b"\xff" * 200]
)
def test_garbage_archive(tmp_path, content):
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    refused(path, model(IMAGES))


def test_archive_cut_off_anywhere(tmp_path):
    data = saved(tmp_path, True, x=images()).read_bytes()
    path = tmp_path / "bad.npz"
    for kept in range(0, len(data) - 1, 53):
        path.write_bytes(data[:kept])
        refused(path, model(IMAGES))


def test_flipped_bits_never_escape_as_another_error(tmp_path):
    data = saved(tmp_path, True, x=images()).read_bytes()
    path = tmp_path / "bad.npz"
    outcomes = set()
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        try:
            open_dataset(path, model(IMAGES))
            outcomes.add("read")
        except DataError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_object_array(tmp_path):
    path = saved(tmp_path, x=np.array([None, {}], dtype=object))
    refused(path, model(IMAGES), "array 'x'", "Python objects")


def test_inflation_bomb_is_not_inflated(tmp_path):
    path = tmp_path / "bad.npz"
    size = 200 << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target, target.open("x.npy", "w") as stream:
        stream.write(npy(f"({size // 4},)"))
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
    with takes_at_most(50_000):
        refused(path, model(IMAGES), "200.0 MiB", limits=Limits(npz_member_bytes=100 << 20))


@pytest.mark.parametrize(
    ("data", "needle"),
    [
        (npy("(1099511627776,)"), "4.0 TiB"),
        (npy("(100,)", body=b"\0" * 8), "400 bytes"),
        (npy("(2,)", body=b"\0" * 4000), "8 bytes"),
        (npy("(-3,)"), "[-3]"),
        (npy("(4,)", descr="|O"), "Python objects"),
        (npy("__import__('os')"), "unreadable header"),
        (npy("(" * 3000), "unreadable header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"\0" * 64, "header"),
        (b"\x93NUMPY\x09\x00" + b"\0" * 64, "not a numpy array"),
        (b"hello", "not a numpy array"),
    ],
)
def test_lying_headers(tmp_path, data, needle):
    refused(archive(tmp_path, x=data), model(IMAGES), needle)


def test_many_members(tmp_path):
    members = {f"a{k}": npy("(0,)") for k in range(9)}
    refused(archive(tmp_path, **members), model(IMAGES), "9 arrays", limits=Limits(npz_members=8))


def test_budgets(tmp_path):
    path = saved(tmp_path, x=images())
    refused(path, model(IMAGES), "more than 3 samples", limits=Limits(samples=3))
    refused(path, model(IMAGES), "samples or 100 bytes", limits=Limits(data_bytes=100))
    refused(path, model(IMAGES), "sample 0, input 'x'", limits=Limits(sample_bytes=100))


# --- folders
# ----------------------------------------------------------------------------------------------------


def test_folder_of_samples_in_order_of_names(tmp_path):
    for k, length in ((2, 5), (0, 3), (1, 3)):
        np.savez(tmp_path / f"{k}.npz", x=np.full((1, length), k, np.int64))
    (tmp_path / "notes.txt").write_text("not data")
    dataset = open_dataset(tmp_path, model("int64[N, T] x"))
    assert [s["x"].shape for s in dataset] == [(1, 3), (1, 3), (1, 5)]
    assert [b["x"].shape for b in dataset.batches(8)] == [(2, 3), (1, 5)]
    assert [int(s["x"][0, 0]) for s in dataset] == [0, 1, 2]


def test_folder_problems(tmp_path):
    refused(tmp_path, model(IMAGES), "no .npz file")
    np.savez(tmp_path / "a.npz", x=images())
    np.savez(tmp_path / "b.npz", y=images())
    refused(tmp_path, model(IMAGES), "sample 1", "'x'")
    (tmp_path / "b.npz").write_bytes(b"zip?")
    refused(tmp_path, model(IMAGES), "b.npz", "not a readable .npz")


# --- memory and random
# ------------------------------------------------------------------------------------------


def test_arrays_in_memory():
    x = images()
    stacked = dataset_from_memory({"x": x}, model(IMAGES))
    listed = dataset_from_memory(({"x": x[k : k + 1]} for k in range(5)), model(IMAGES))
    for dataset in (stacked, listed):
        assert len(dataset) == 5
        for _ in range(2):
            np.testing.assert_array_equal(np.concatenate([s["x"] for s in dataset]), x)
    with pytest.raises(DataError, match="did you mean"):
        dataset_from_memory({"xx": x}, model(IMAGES))
    with pytest.raises(DataError, match="float64"):
        dataset_from_memory([{"x": x.astype(float)}], model(IMAGES))


def test_random_samples():
    network = model("float[N, 3, H, W] x,  int64[N, H] ids,  bool flag")
    first, again = (random_dataset(network, 3, seed=1, dims={"W": 7}) for _ in range(2))
    other = random_dataset(network, 3, seed=2, dims={"W": 7})
    assert first.warnings
    for a, b, c in zip(first, again, other, strict=True):
        assert a["x"].shape == (1, 3, 32, 7) and a["ids"].shape == (1, 32) and a["flag"].shape == ()
        assert set(np.unique(a["ids"])) <= {0, 1}
        np.testing.assert_array_equal(a["x"], b["x"])
        assert not np.array_equal(a["x"], c["x"])


def test_array_header_reader_keeps_up_with_numpy(tmp_path):
    """The bounded header reader agrees with numpy on the layouts numpy writes."""
    for dtype in ("<f4", ">i2", "|b1", "<c8", "<f2"):
        buffer = io.BytesIO()
        array = np.arange(6).reshape(2, 3).astype(dtype)
        np.savez(buffer, a=array)
        path = tmp_path / "a.npz"
        path.write_bytes(buffer.getvalue())
        from bitwright.compiler.ingest import npz

        with npz.opened(path) as opened:
            member = npz.headers(opened, path, Limits())["a"]
            np.testing.assert_array_equal(npz.whole(opened, member), array)
            np.testing.assert_array_equal(np.stack(list(npz.rows(opened, member))), array)
