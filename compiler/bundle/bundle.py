"""A finished output folder, opened for use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bitwright.compiler.bundle.functions import merged
from bitwright.compiler.bundle.manifest import Manifest, check_files, read_manifest
from bitwright.compiler.bundle.segments import SegmentList, execute_segments, read_segments
from bitwright.compiler.errors import UsageError
from bitwright.targets.backend import Backend, Execution, backend_for
from bitwright.targets.generator import Generator, Simulation, generator_for
from bitwright.targets.schema import GENERATED_FAMILIES, Profile
from bitwright.targets.toolchain.runner import RUNNER_FILE
from bitwright.targets.toolchain.shape_rules import Dispatch, ShapeRules

MODEL_FILE = "model.onnx"
LIBRARY_FOLDER = "lib"
STATIC_MODEL_FILE = "lib/model.static.onnx"
SESSION_FILE = "model.session.json"
PLAN_FILE = "plan.yaml"
REPORT_FILE = "report.json"
GOLDEN_FOLDER = "golden"


@dataclass(frozen=True)
class GoldenSet:
    """One set of recorded inputs and the outputs they gave when the bundle was made.

    Attributes:
        number: K of ``inputs_K.npz``.
        inputs: Input name -> array.
        outputs: Output name -> array.
    """

    number: int
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Bundle:
    """An output folder whose files are those that were written.

    Attributes:
        path: The folder.
        manifest: Its manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open an output folder and check every file against the manifest.

        Raises:
            UsageError: It is no bundle, or a file is missing or was changed.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        return cls(folder, manifest)

    @cached_property
    def profile(self) -> Profile:
        """The target profile it was compiled for."""
        return self.manifest.load_profile()

    @property
    def backend(self) -> Backend:
        """The family that runs its artifact."""
        return backend_for(self.profile.family)

    @property
    def generated(self) -> bool:
        """Whether the artifact is a circuit or a command stream, no library."""
        return self.profile.family in GENERATED_FAMILIES

    @property
    def generator(self) -> Generator:
        """The family that made its artifact, if it was generated."""
        return generator_for(self.profile.family)

    @cached_property
    def report(self) -> dict[str, Any]:
        """The content of report.json."""
        report: dict[str, Any] = json.loads(self._text(REPORT_FILE))
        return report

    @property
    def plan_text(self) -> str:
        """The text of plan.yaml."""
        return self._text(PLAN_FILE)

    def golden(self) -> Iterator[GoldenSet]:
        """Yield the golden sets in the order of their numbers."""
        folder = self.path / GOLDEN_FOLDER
        for number in sorted(int(p.stem.split("_")[1]) for p in folder.glob("inputs_*.npz")):
            yield GoldenSet(
                number, _arrays(folder / f"inputs_{number}.npz"), _arrays(folder / f"outputs_{number}.npz")
            )

    def why_not_executable(self) -> str | None:
        """Return why the artifact cannot be executed on this machine, or None if it can."""
        if self.generated:
            return self.generator.why_not_executable(self.profile)
        if self.segments is not None and not self.segments.has_library:
            return None
        if not (self.path / LIBRARY_FOLDER / RUNNER_FILE).exists():
            return "the bundle has no runner: TVM's runtime libraries were not available when it was made"
        return self.backend.why_not_executable(self.profile)

    def run(
        self, feeds: Mapping[str, np.ndarray], runtime: Literal["artifact", "ort"] = "artifact"
    ) -> dict[str, np.ndarray]:
        """Compute the model's outputs.

        Args:
            feeds: Input name -> array of the model's element type and shape.
            runtime: ``"artifact"``: the compiled library, on this machine or in its emulator.
                ``"ort"``: model.onnx in ONNX Runtime with the options of model.session.json.

        Raises:
            DataError: ``feeds`` does not fit the model.
            ToolchainError: The artifact cannot be run here.
        """
        if runtime == "artifact":
            return dict(self.execute(feeds).outputs)
        if runtime == "ort":
            return self._run_in_ort(feeds)
        msg = f"unknown runtime '{runtime}'"
        raise UsageError(msg, fix="use 'artifact' or 'ort'")

    def execute(self, feeds: Mapping[str, np.ndarray], *, trace: bool = False, repeat: int = 1) -> Execution:
        """Run the artifact and return outputs, time and, if asked for, every integer kernel's operands.

        What the library cannot compute is executed by ONNX Runtime, on this machine whatever the target is.

        Raises:
            DataError: ``feeds`` does not fit the model; for a model of several shapes the message names them.
            ToolchainError: The artifact cannot be run here.
        """
        if self.generated:
            found = self.simulate(feeds)
            return Execution(found.outputs, (), found.executed, None, measurements=found.measurements)
        if self.rules is None:
            return self._execute_once("", feeds, trace, repeat)
        dispatch = self.rules.dispatch(feeds)
        return merged(self.rules, dispatch, self.execute_calls(dispatch, trace=trace, repeat=repeat))

    def simulate(self, feeds: Mapping[str, np.ndarray], *, check: bool = False) -> Simulation:
        """Execute a generated artifact, with ``check`` every layer against its integer reference.

        Raises:
            DataError: ``feeds`` does not fit the model.
            ToolchainError: The artifact cannot be executed here.
        """
        return self.generator.execute(self.path / LIBRARY_FOLDER, feeds, self.profile, check=check)

    def execute_calls(self, dispatch: Dispatch, *, trace: bool = False, repeat: int = 1) -> list[Execution]:
        """Run every call of a dispatch of :attr:`rules`, as :meth:`execute` does."""
        return [self._execute_once(dispatch.function.folder, call, trace, repeat) for call in dispatch.calls]

    def _execute_once(
        self, part: str, feeds: Mapping[str, np.ndarray], trace: bool, repeat: int
    ) -> Execution:
        def library(name: str, inputs: Mapping[str, np.ndarray]) -> Execution:
            return self.backend.execute(
                self.path, inputs, self.profile, trace=trace, repeat=repeat, library=name
            )

        if self.segments is None:
            return library(part, feeds)
        lib = self.path / LIBRARY_FOLDER
        return execute_segments(lib, feeds, library=library, model=self._run_segment, repeat=repeat)

    @cached_property
    def rules(self) -> ShapeRules | None:
        """The shapes of the artifact if it has several."""
        return ShapeRules.read(self.path / LIBRARY_FOLDER)

    @cached_property
    def segments(self) -> SegmentList | None:
        """What the artifact consists of if it is not one library."""
        return read_segments(self.path / LIBRARY_FOLDER)

    def _run_segment(self, path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from bitwright.compiler.ort.session import local_config, open_session, run

        if path.name not in self._segment_sessions:
            config = local_config(self.profile.runtimes.onnxruntime, threads=self.profile.cores)
            self._segment_sessions[path.name] = open_session(path, config)
        return run(self._segment_sessions[path.name], feeds)

    @cached_property
    def _segment_sessions(self) -> dict[str, Any]:
        return {}

    def _run_in_ort(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from bitwright.compiler.ort.session import run

        return run(self._session, feeds)

    @cached_property
    def _session(self) -> Any:
        """The deployed model, opened as model.session.json says."""
        from bitwright.compiler.ort.session import local_config, open_session

        config = local_config(self.profile.runtimes.onnxruntime, threads=self.profile.cores)
        return open_session(self.path / MODEL_FILE, config)

    def _text(self, name: str) -> str:
        if name not in self.manifest.files:
            msg = f"the bundle holds no {name}"
            raise UsageError(msg, where=str(self.path))
        return (self.path / name).read_text()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        msg = f"golden data cannot be read: {error}"
        raise UsageError(msg, where=str(path)) from error
