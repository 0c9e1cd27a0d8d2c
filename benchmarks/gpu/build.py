"""Writes a kit: runtime libraries, machine code, models, inputs, what they must give, and the scripts."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from zoo import Feeds, model_named

from bitwright.compiler.artifact import emit, lower
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import FRONT
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.tune.farm import Farm
from bitwright.compiler.tune.hardware import hardware_key
from bitwright.targets.loader import load_profile
from bitwright.targets.nvidia_gpu.codegen import CudaSource, compile_cuda, cuda_source
from bitwright.targets.nvidia_gpu.emulated_device import runner_folder
from bitwright.targets.nvidia_gpu.emulated_kernels import build_kernels
from bitwright.targets.nvidia_gpu.kernels import gpu_of
from bitwright.targets.nvidia_gpu.ptxas import require_fitting
from bitwright.targets.schema import Profile
from gpu.items import Item, half_products, int4_rows, int8_products, model_kernels

KIT = Path(__file__).parent / "kit"
RUNTIME_FILES = ("runner", "libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so")
CUDA_RUNTIMES = (
    "/usr/local/cuda/lib64/libcudart.so.13",
    "/usr/local/cuda/targets/x86_64-linux/lib/libcudart.so.13",
)
MOST_BYTES = 60_000_000
SAMPLES = 16
# Batch and tokens of the encoder that is measured.
BATCH, TOKENS = 32, 128
# The largest difference of an output: networks that are integers up to their softmax, and one whose layers meet float
# operators, where another order of a sum may move an activation to the next integer.
BOUNDS = {"minilm_l6": 0.02}
INTEGER_BOUND = 1e-5


@dataclass(frozen=True)
class Records:
    """Where times of an earlier run are.

    Attributes:
        device_key: What that run's device was called.
        store: File of tuning records.
    """

    device_key: str
    store: Path


def build_kit(
    out: Path,
    profile_name: str,
    models: Sequence[str],
    size: int,
    *,
    emulated: bool = False,
    records: Records | None = None,
) -> int:
    """Write the folder; returns its size in bytes.

    Args:
        out: Is created; must not exist.
        profile_name: The GPU.
        models: Zoo models.
        size: Side of the measured products.
        emulated: Add what runs the kit on this machine's processor.
        records: The models' kernels are chosen by these; None: by the templates' estimates.

    Raises:
        BitwrightError: Something cannot be compiled.
        ValueError: The folder would be too large to be carried.
    """
    profile = load_profile(profile_name)
    out.mkdir(parents=True)
    for script in sorted(KIT.glob("*.py")):
        shutil.copyfile(script, out / script.name)
    _write_runtime(out / "runtime")
    items = [*int8_products(size, profile), *half_products(size, profile), *int4_rows(size, profile)]
    for name in models:
        items += _write_model(out / "models" / name, name, profile, records, emulated=emulated)
    source = _write_kernels(out, items, profile)
    if emulated:
        (out / "emulation").mkdir()
        build_kernels(source.text, out / "emulation/kernels.so")
    about: dict[str, Any] = {
        "profile": profile.name,
        "architecture": gpu_of(profile).architecture,
        "gemm_size": size,
    }
    about["made_by"] = hardware_key(profile, "")
    (out / "kit.json").write_text(json.dumps({**about, "models": list(models)}, indent=1) + "\n")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if total > MOST_BYTES:
        msg = f"the kit has {total / 1e6:.1f} MB, at most {MOST_BYTES / 1e6:.0f} can be carried"
        raise ValueError(msg)
    return total


def _write_runtime(folder: Path) -> None:
    """Copy TVM's runtime and the runner, and CUDA's runtime library for machines that lack this version of it."""
    folder.mkdir()
    for name in RUNTIME_FILES:
        shutil.copy(runner_folder() / name, folder / name)
    for path in map(Path, CUDA_RUNTIMES):
        if path.exists():
            shutil.copyfile(path, folder / "libcudart.so.13")
            return


def _samples(name: str) -> tuple[list[Feeds], dict[str, int]]:
    """Return calibration samples, with one of the measured shape, and that shape's free sizes."""
    found = [s for s, _ in zip(model_named(name).samples(), range(SAMPLES), strict=False)]
    if name != "minilm_l6":
        return found, {}
    sized = {key: np.resize(array, (BATCH, TOKENS)) for key, array in found[0].items()}
    return [*found, sized], {"N": BATCH, "T": TOKENS}


def _write_model(
    place: Path, name: str, profile: Profile, records: Records | None, *, emulated: bool
) -> list[Item]:
    """Compile a model and write its library with golden inputs and outputs; returns its kernels.

    The phases of a compilation without the last: executing a batch of this size by emulation takes too long.
    """
    data, dims = _samples(name)
    options = Options(model=model_named(name).path, target=profile.name, data=data, dims=dims, golden=1)
    if records is not None:
        options = replace(options, farm=Farm(records.device_key), tuning_store=records.store)
    c = Compilation(options, profile)
    notes: list[str] = []
    for _, phase in FRONT:
        phase(c, notes)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder)
        lower(c, bundle, notes)
        emit(c, bundle, notes)
        _copy_model(bundle, place, name, emulated=emulated)
    assert c.static is not None
    return list(model_kernels(name, extract_program(c.static), profile))


def _copy_model(bundle: Path, place: Path, name: str, *, emulated: bool) -> None:
    place.mkdir(parents=True)
    shutil.copyfile(bundle / "lib/model.so", place / "model.so")
    interface = json.loads((bundle / "lib/interface.json").read_text())
    about: dict[str, Any] = {"library": "model.so", "bound": BOUNDS.get(name, INTEGER_BOUND)}
    for kind, stored, written in (("inputs", "inputs", "input"), ("outputs", "outputs", "golden")):
        about[kind] = [port["name"] for port in interface[kind]]
        with np.load(bundle / f"golden/{stored}_0.npz") as archive:
            for number, port in enumerate(about[kind]):
                np.save(place / f"{written}_{number}.npy", archive[port])
    if emulated:
        shutil.copyfile(bundle / "lib/emulation/kernels.so", place / "kernels.so")
        about["emulated"] = "kernels.so"
    (place / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def _write_kernels(out: Path, items: Sequence[Item], profile: Profile) -> CudaSource:
    """Write machine code, constants and the records of all kernels."""
    gpu = gpu_of(profile)
    source = cuda_source({item.name: item.kernel.function for item in items}, gpu.architecture)
    code, resources = compile_cuda(source.text, gpu.architecture)
    require_fitting(resources, gpu, source.launches(), spills=True)
    (out / "kernels.cubin").write_bytes(code)
    records = list(_records(items, source))
    arrays = {key: array for item in items for key, array in item.arrays.items()}
    np.savez_compressed(out / "kernels.npz", **arrays)  # type: ignore[arg-type]  # of arrays by name
    (out / "kernels.json").write_text(json.dumps(records, indent=1) + "\n")
    return source


def _records(items: Sequence[Item], source: CudaSource) -> Iterator[dict[str, Any]]:
    for item in items:
        function = source.functions[item.name]
        (launch,) = function.launches
        yield item.record(function.parameters, asdict(launch))
