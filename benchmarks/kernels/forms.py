"""The forms of a model that compete, built once and kept: our artifacts, and what ONNX Runtime can run."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bitwright.compiler.bench.entry import Entry
from bitwright.compiler.bench.models import load_session_config
from bitwright.compiler.bundle.bundle import SESSION_FILE, STATIC_MODEL_FILE, Bundle
from bitwright.compiler.bundle.golden import write_npz
from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.tune.budget import OFF, parse_budget
from bitwright.passes.normalize import specialize
from bitwright.targets.toolchain.linker import find_driver
from kernels.models import BenchModel
from kernels.table import WITHOUT_AMX

FLOAT, STATIC, STATIC_DOTS, OWN = "fp32", "quantize_static", "quantize_static, dot products", "our Q/DQ"
RIVALS = (FLOAT, STATIC, STATIC_DOTS, OWN)
DOTS = ["Conv", "Gemm", "MatMul"]
TUNED = "+tuned"
# The first opset whose DequantizeLinear has an axis.
CHANNEL_OPSET = 13


class _Samples(CalibrationDataReader):
    def __init__(self, samples: list[dict[str, np.ndarray]]) -> None:
        self._left = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


class Forms:
    """The files of one model.

    Args:
        model: What is built.
        folder: Where its files are kept between runs.
    """

    def __init__(self, model: BenchModel, folder: Path) -> None:
        self.model, self.folder = model, folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def source(self) -> Path:
        """The float model."""
        made = self.folder / "model.onnx"
        return made if made.exists() else self.model.build(self.folder)

    def bundle(self, target: str, *, tune: str = "off") -> Bundle:
        """Return the bundle for a target such as ``host`` or ``host+tuned``, compiled if it is not there yet.

        Raises:
            BitwrightError: It cannot be compiled.
        """
        path = self.folder / target
        with suppress(UsageError):
            return Bundle.open(path)
        if path.exists():
            shutil.rmtree(path)
        tuned = target.endswith(TUNED)
        made = compile_model(
            Options(
                model=self.source,
                target=target.removesuffix(TUNED),
                data=list(self.model.samples()),
                dims=dict(self.model.dims),
                output=path,
                tune=parse_budget(tune) if tuned else OFF,
                # Records of earlier runs would tune what is to be untuned.
                tuning_store=self.folder.parent
                / ("tuned.records" if tuned else f"untuned-{self.model.name}.records"),
            )
        )
        assert made is not None
        return made

    def feeds(self, bundle: Bundle) -> Path:
        """Return the inputs that everything is timed on: golden inputs of a bundle."""
        path = self.folder / "feeds.npz"
        if not path.exists():
            write_npz(path, next(iter(bundle.golden())).inputs)
        return path

    def rival(self, name: str, bundle: Bundle) -> Path:
        """Return the file of a form that ONNX Runtime runs, made if it is not there yet; all have static shapes."""
        if name == OWN:
            return bundle.path / STATIC_MODEL_FILE
        fixed = self.folder / "fp32.onnx"
        if not fixed.exists():
            model = read_model(self.source).model.clone()
            specialize(model, bundle.report["target"]["dims"])
            save_model(ir.Model(model.graph, ir_version=model.ir_version), fixed)
        if name == FLOAT:
            return fixed
        path = self.folder / ("static.onnx" if name == STATIC else "static-dots.onnx")
        if not path.exists():
            self._quantize(fixed, path, bundle, None if name == STATIC else DOTS)
        return path

    def _quantize(self, fixed: Path, path: Path, bundle: Bundle, operators: list[str] | None) -> None:
        """Let ONNX Runtime quantize: unsigned activations, signed weights, a scale a channel; calibrated as ours."""
        with np.load(self.feeds(bundle)) as archive:
            shapes = {name: archive[name].shape for name in archive.files}
            first = {name: archive[name] for name in archive.files}
        fitting = [s for s in self.model.samples() if all(np.shape(s[n]) == shapes[n] for n in shapes)]
        prepared = path.with_suffix(".prepared.onnx")
        source = onnx.load(fixed)
        if next(o.version for o in source.opset_import if o.domain in ("", "ai.onnx")) < CHANNEL_OPSET:
            onnx.save(onnx.version_converter.convert_version(source, CHANNEL_OPSET), prepared)
            fixed = prepared
        quant_pre_process(str(fixed), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _Samples([{n: s[n] for n in shapes} for s in fitting[:16]] or [first]),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=operators,
        )
        prepared.unlink()
        try:
            open_session(path)
        except ModelError:
            path.unlink()  # it is made, and its failure noted, again
            raise

    def rival_entry(self, name: str, bundle: Bundle, threads: int) -> Entry:
        """Return how a form that ONNX Runtime runs is timed; our file has our session options."""
        form = name.removesuffix(WITHOUT_AMX)
        session = load_session_config(bundle.path / SESSION_FILE) if form == OWN else SessionConfig()
        preload = refusing_amx(self.folder.parent) if name != form else None
        path, feeds = self.rival(form, bundle), self.feeds(bundle)
        return Entry(name, "onnxruntime", path, feeds, threads, session, preload)

    def artifact_entry(self, target: str, bundle: Bundle, threads: int) -> Entry:
        """Return how an artifact is timed."""
        return Entry(target, "artifact", bundle.path, self.feeds(bundle), threads)


def refusing_amx(folder: Path) -> Path:
    """Return the library that refuses AMX to the process it is preloaded into, built if it is not there yet."""
    library = folder / "no_amx.so"
    if not library.exists():
        source = Path(__file__).with_name("no_amx.c")
        driver = find_driver(f"{platform.machine()}-linux-gnu")
        built = library.with_suffix(".part")
        driver.run(
            [*driver.command, "-shared", "-fPIC", "-O1", str(source), "-o", str(built), "-ldl"],
            f"compiling {source.name}",
        )
        built.replace(library)
    return library


def has_amx() -> bool:
    """Tell whether this processor has the tile registers."""
    return "amx_int8" in Path("/proc/cpuinfo").read_text()


def failure(folder: Path, what: str, error: BaseException) -> dict[str, str]:
    """Note that something could not be built; a table shows it, and a later run tries again."""
    record = {"what": what, "why": " ".join(str(error).split())[:400]}
    with (folder / "failures.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record
