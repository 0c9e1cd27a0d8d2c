"""The C interface of a bundle: built with g++ and with CMake, run without Python, and every damage named."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_model import sample, samples, write_model
from recurrent_model import samples as recurrent_samples
from recurrent_model import save_recurrent

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.manifest import Manifest
from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model

pytestmark = [
    pytest.mark.skipif(platform.system() != "Linux", reason="artifacts of this machine run under Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
]
DRIVER = Path(__file__).with_name("c_driver.cc")
# No Python is found by a program that is started like this.
BARE = {"PATH": "/nowhere", "LC_ALL": "C"}
BUNDLE, MACHINE, INPUT, ARGUMENT = 2, 3, 4, 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("c_runtime")
    made = compile_model(
        Options(
            model=write_model(folder / "attention.onnx"),
            target="host",
            data=samples(),
            output=folder / "out",
            buckets={"T": (4, 12)},
            pad={"x": 0.0, "mask": 0.0},
            loop="N",
            static="attention",
        )
    )
    assert made is not None
    return made


@pytest.fixture(scope="module")
def lib(bundle: Bundle) -> Path:
    return bundle.path / "lib"


def build(lib: Path, program: Path, source: Path, *flags: str) -> Path:
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{lib}",
        f"-I{lib}/include",
        str(source),
    ]
    link = [f"-L{lib}", *flags, "-lbitwright_runtime", "-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    link += ["-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{lib}", "-lpthread"]
    subprocess.run([*command, "-o", str(program), *link], check=True)
    return program


@pytest.fixture(scope="module")
def driver(lib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(lib, tmp_path_factory.mktemp("driver") / "driver", DRIVER)


@pytest.fixture(scope="module")
def feeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], list[str]]:
    arrays, folder = sample(7, 42, batch=3), tmp_path_factory.mktemp("feeds")
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays, [str(folder / f"{name}.npy") for name in ("x", "mask")]


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=BARE, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def check_outputs(folder: Path, bundle: Bundle, arrays: dict[str, np.ndarray]) -> None:
    expected = bundle.run(arrays)
    for number, name in enumerate(("tokens", "pooled")):
        np.testing.assert_array_equal(np.load(folder / f"output_{number}.npy"), expected[name])


def test_the_example_computes_what_the_bundle_computes(
    lib: Path, bundle: Bundle, feeds: tuple[dict[str, np.ndarray], list[str]], tmp_path: Path
) -> None:
    program = build(lib, tmp_path / "example", lib / "example.cc")
    printed = run(program, lib, tmp_path, "--threads", 2, *feeds[1])
    assert "tokens [3, 7, 16]" in printed and "pooled [3, 8]" in printed
    check_outputs(tmp_path, bundle, feeds[0])


def test_the_model_in_a_program_needs_no_file(
    lib: Path, bundle: Bundle, feeds: tuple[dict[str, np.ndarray], list[str]], tmp_path: Path
) -> None:
    defines = ["-DBITWRIGHT_STATIC_MODEL=attention", '-DBITWRIGHT_STATIC_HEADER="attention.h"']
    program = build(lib, tmp_path / "example_static", lib / "example.cc", *defines, "-lattention")
    run(program, tmp_path, *feeds[1])
    check_outputs(tmp_path, bundle, feeds[0])


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on this machine")
def test_cmake_builds_both(
    lib: Path, bundle: Bundle, feeds: tuple[dict[str, np.ndarray], list[str]], tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    for command in (["cmake", "-S", str(lib), "-B", str(tmp_path)], ["cmake", "--build", str(tmp_path)]):
        subprocess.run(command, check=True, env=environment, capture_output=True)
    run(tmp_path / "example", lib, tmp_path, *feeds[1])
    check_outputs(tmp_path, bundle, feeds[0])
    run(tmp_path / "example_static", tmp_path, *feeds[1])
    check_outputs(tmp_path, bundle, feeds[0])


def test_ports_name_the_free_dimensions(lib: Path, driver: Path) -> None:
    assert run(driver, "ports", lib).splitlines() == [
        "input x 10 N T 16",
        "input mask 10 N T",
        "output tokens 10 N T 16",
        "output pooled 10 N 8",
    ]


def test_threads_with_a_handle_each(
    lib: Path, driver: Path, feeds: tuple[dict[str, np.ndarray], list[str]]
) -> None:
    assert run(driver, "threads", lib, 3, 40, *feeds[1]) == "0 different\n"


def test_misuse_is_an_error_not_a_crash(lib: Path, driver: Path) -> None:
    lines = run(driver, "misuse", lib).splitlines()
    expected = [
        (ARGUMENT, "null pointer"),
        (ARGUMENT, "null pointer"),
        (ARGUMENT, "null pointer"),
        (ARGUMENT, "bw_run has not succeeded"),
        (ARGUMENT, "no port 99: there are 2"),
        (ARGUMENT, "no port -1"),
        (ARGUMENT, "0 is no number of threads"),
        (ARGUMENT, "null pointer"),
        (INPUT, "the model has 2 inputs, got 1"),
        (INPUT, "input 'x': no data"),
        (INPUT, "this shape takes 256 bytes, got 255"),
        (INPUT, "input 'x': expected elements of type float32"),
        (INPUT, "input 'x': expected 3 dimensions, got 2"),
        (INPUT, "input 'mask': dimension 1, T is 5, expected 4"),
        (INPUT, "input 'x': dimension 1, T is -4, expected 1"),
        (INPUT, "T=13 is larger than the largest bucket; T has 4, 12"),
        (0, ""),
        (0, ""),
        (ARGUMENT, "no output 2: there are 2"),
    ]
    assert len(lines) == len(expected)
    for line, (status, message) in zip(lines, expected, strict=True):
        assert line.startswith(f"{status} ") and message in line, line


def test_the_planned_memory_is_what_a_call_takes(driver: Path, tmp_path: Path) -> None:
    """Ten megabytes of activations: the process grows by the plan's pool and the copy of the input."""
    text = (
        '<ir_version: 9, opset_import: ["" : 20]>\n'
        "g (float[4096, 256] x) => (float[4096, 256] z) { y = MatMul (x, w1)\n h = Softmax (y)\n z = MatMul (h, w2) }"
    )
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for name in ("w1", "w2"):
        array = generator.normal(size=(256, 256)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array / 16, name))
    onnx.save(proto, tmp_path / "mlp.onnx")
    data = [{"x": generator.normal(size=(4096, 256)).astype(np.float32)} for _ in range(3)]
    made = compile_model(
        Options(model=tmp_path / "mlp.onnx", target="host", data=data, output=tmp_path / "out")
    )
    assert made is not None
    (function,) = made.report["deployment"]["functions"]
    np.save(tmp_path / "x.npy", data[0]["x"])
    grown = int(run(driver, "memory", made.path / "lib", tmp_path / "x.npy"))
    planned = function["memory"]["pool_bytes"] + data[0]["x"].nbytes
    assert planned > 10e6
    # Half a megabyte for the allocator's own books and pages that were touched before; a tenth for what is not.
    assert 0.9 * planned - 5e5 < grown < planned + function["memory"]["peak_bytes"] * 0.1 + 5e5


@pytest.fixture
def copy(lib: Path, tmp_path: Path) -> Path:
    for name in ("model.txt", "model.so"):
        shutil.copyfile(lib / name, tmp_path / name)
    return tmp_path


def opened(driver: Path, folder: Path) -> tuple[int, str]:
    status, _, message = run(driver, "open", folder).partition(" ")
    return int(status), message.strip()


def test_every_cut_of_the_description_is_refused(driver: Path, copy: Path) -> None:
    assert opened(driver, copy) == (0, "")
    text = (copy / "model.txt").read_text()
    for length in (*range(0, len(text), 23), len(text) - 1, len(text) - 4):
        (copy / "model.txt").write_text(text[:length])
        status, message = opened(driver, copy)
        assert status == BUNDLE and "model.txt, line " in message, (length, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bitwright-model 1", "bitwright-model 2", "line 1: the version of the format is unknown"),
        ("bitwright-model 1", "hello", "line 1: this is no model of Bitwright"),
        ("float32 0.0 3 ", "float32 0.0 300 ", "a line is damaged"),
        ("float32", "float33", "a line is damaged"),
        ("$1", "$7", "a line is damaged"),
        ("bucket 4 12", "bucket 12 4", "a line is damaged"),
        ("bucket 4 12", "bucket 4 99999999999999999999", "a line is damaged"),
        ("function main_1", "function main_7", "the library has no function main_7"),
        ("library model.so", "library ../model.so", "a line is damaged"),
        ("library model.so", "library other.so", "other.so: No such file"),
        ("end\n", "end\nfunction main 4 1\n", "a line is damaged"),
        ("threads", "treads", "a line is damaged"),
    ],
)
def test_a_damaged_description_is_refused(driver: Path, copy: Path, old: str, new: str, message: str) -> None:
    path = copy / "model.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    status, found = opened(driver, copy)
    assert status != 0 and message in found, found


def test_a_missing_cut_or_changed_library_is_refused(driver: Path, copy: Path) -> None:
    library = copy / "model.so"
    content = library.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        library.write_bytes(content[:length])
        status, message = opened(driver, copy)
        assert status == BUNDLE and f"has {length} bytes, expected {len(content)}" in message
    middle = len(content) // 2
    library.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert opened(driver, copy) == (BUNDLE, f"{library}: was changed or damaged")
    library.unlink()
    assert opened(driver, copy)[0] == BUNDLE
    (copy / "model.txt").unlink()
    assert "No such file or directory (give the 'lib' folder" in opened(driver, copy)[1]
    assert opened(driver, copy / "nowhere")[0] == BUNDLE


def test_another_processor_is_refused_before_an_illegal_instruction(driver: Path, copy: Path) -> None:
    path = copy / "model.txt"
    path.write_text(path.read_text().replace("\nprocessor ", "\nprocessor no_such_feature ", 1))
    status, message = opened(driver, copy)
    assert status == MACHINE and "'no_such_feature', which this one lacks" in message


def test_a_model_with_parts_for_onnxruntime_is_refused(driver: Path, tmp_path: Path) -> None:
    model = save_recurrent(tmp_path / "gru.onnx")
    made = compile_model(
        Options(model=model, data=recurrent_samples(), output=tmp_path / "out", target="host")
    )
    assert made is not None and made.segments is not None
    status, message = opened(driver, made.path / "lib")
    assert status == BUNDLE and "1 parts of this model run in ONNX Runtime" in message


def test_a_model_with_parts_for_onnxruntime_has_no_archive(tmp_path: Path) -> None:
    model = save_recurrent(tmp_path / "gru.onnx")
    given = Options(
        model=model, data=recurrent_samples(), output=tmp_path / "out", target="host", static="gru"
    )
    with pytest.raises(ToolchainError, match="cannot be linked into a program"):
        compile_model(given)
    assert not (tmp_path / "out").exists()


def test_the_manifest_lists_the_runtime(bundle: Bundle) -> None:
    assert isinstance(bundle.manifest, Manifest)
    for name in (
        "model.txt",
        "include/bitwright_runtime.h",
        "CMakeLists.txt",
        "example.cc",
        "libattention.a",
    ):
        assert f"lib/{name}" in bundle.manifest.files


def test_the_header_is_plain_c(lib: Path, tmp_path: Path) -> None:
    source = tmp_path / "main.c"
    source.write_text(
        '#include "attention.h"\n#include <stdio.h>\n'
        "int main(void) {\n"
        "  bw_model* model = NULL;\n"
        "  if (bw_abi_version() != BW_ABI_VERSION) return 1;\n"
        "  if (bw_open_embedded(&attention, &model) != BW_OK) { fputs(bw_last_error(), stderr); return 1; }\n"
        '  printf("%d %d\\n", bw_input_count(model), bw_output_count(model));\n'
        "  bw_close(model);\n"
        "  return 0;\n"
        "}\n"
    )
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{lib}/include", str(source)]
    link = [
        "-o",
        str(tmp_path / "main"),
        f"-L{lib}",
        "-lattention",
        "-lbitwright_runtime",
        "-Wl,--no-as-needed",
    ]
    link += ["-ltvm_runtime", "-ltvm_ffi", "-Wl,--allow-shlib-undefined", f"-Wl,-rpath,{lib}"]
    subprocess.run([*command, *link], check=True)
    assert run(tmp_path / "main") == "2 2\n"
