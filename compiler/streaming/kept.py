"""Finished parts on the disk: a run that was interrupted goes on behind the last of them.

Beside the output stands a folder with the weights' file, which becomes the output's, and for each part its graph, what
is reported about it, and the model's outputs that it makes; of the last part also what it passes on. A part is finished
when its record is there, which is written last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright import __version__
from bitwright.compiler import frontend
from bitwright.compiler.bundle.atomic import remove, storage_errors, sync_file, write_atomically
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import BitwrightError, DataError, UsageError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.ingest import npz
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS
from bitwright.compiler.streaming.held import HeldArrays

SETTINGS = "settings.json"
TIED = "tied.npz"
SUFFIX = ".parts"
VERSION = 1
Plain = dict[str, Any]


def place_of(output: Path) -> Path:
    """Return the folder that finished parts of an output are kept in."""
    return output.with_name(f"{output.name}{SUFFIX}")


def settings_of(c: Compilation, way: str) -> Plain:
    """Return what must be equal for parts to be taken over, as JSON values: contents, not names of files."""
    assert c.source is not None, "ingest is done"
    options = c.options
    return {
        "version": VERSION,
        "bitwright": __version__,
        "model": c.source.sha256,
        "samples": _samples_digest(c),
        "target": hashlib.sha256(c.profile.model_dump_json().encode()).hexdigest(),
        "recipe": {**c.recipe.as_plain(), "nodes": dict(c.recipe.recipe.nodes)},
        "stream": way,
        "group": options.group,
        "keep_float": sorted(options.keep_float),
        "dims": dict(options.dims),
        "unpadded": options.unpadded,
    }


def _samples_digest(c: Compilation) -> str:
    found = hashlib.sha256()
    for sample in frontend.samples_of(c).batches(1):
        for name, array in sorted(sample.items()):
            found.update(f"{name} {array.dtype.str} {array.shape} ".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@contextmanager
def kept_parts(output: Path, settings: Mapping[str, Any], resume: bool) -> Iterator[KeptParts]:
    """Give the finished parts of an output; they are gone when the block ends or fails for good.

    They stay where the run could go on from them: it was interrupted or killed, or the disk is full.

    Args:
        output: The .onnx file to be written.
        settings: See :func:`settings_of`.
        resume: Go on from parts that are there already; else these are deleted.

    Raises:
        UsageError: There are none to go on from, they were made with other settings, or the disk is full.
        DataError: They are damaged.
    """
    kept = _taken_over(place_of(output), settings) if resume else _begun(output, settings)
    try:
        yield kept
    except BitwrightError as error:
        full = isinstance(error, UsageError) and isinstance(error.__cause__, OSError)
        if not full or not kept.count:
            remove(kept.folder)
            raise
        what = f"{error.what.partition(';')[0]}; finished parts are in {kept.folder}"
        fix = "free some space and repeat the command with --resume, or delete the folder"
        raise UsageError(what, where=str(output), fix=fix) from error.__cause__
    remove(kept.folder)


def _begun(output: Path, settings: Mapping[str, Any]) -> KeptParts:
    folder = place_of(output)
    with storage_errors(output):
        remove(folder)
        folder.mkdir(parents=True)
        write_atomically(folder / SETTINGS, json.dumps(settings).encode())
    return KeptParts(folder)


def _taken_over(folder: Path, settings: Mapping[str, Any]) -> KeptParts:
    where, fix = f"--resume {folder}", "leave --resume out"
    if not (folder / SETTINGS).is_file():
        what = "there are no finished parts to go on from"
        raise UsageError(what, where=where, fix=fix)
    known, settings = _parsed(folder / SETTINGS), json.loads(json.dumps(settings))
    if known != settings:
        changed = sorted(k for k in settings if known.get(k) != settings[k])
        what = f"the finished parts were made with other settings: {', '.join(changed) or 'some are gone'}"
        raise UsageError(what, where=where, fix=f"repeat the options of the first run, or {fix}")
    return KeptParts(folder)


def _parsed(path: Path) -> Plain:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise damaged(path) from error
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def damaged(path: Path) -> DataError:
    """Return the error for a file that is not as it was written."""
    what = "a finished part is damaged, or of another run"
    return DataError(what, where=str(path), fix="leave --resume out")


class KeptParts:
    """The folder.

    Attributes:
        folder: Where it is.
        data: The weights' file, of the name that it will have beside the output.
        count: How many parts are finished.
    """

    def __init__(self, folder: Path) -> None:
        """Look at a folder."""
        self.folder = folder
        self.data = folder / f"{folder.name.removesuffix(SUFFIX)}.data"
        self.count = 0
        while self._path(self.count, "json").is_file():
            self.count += 1

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:04d}.{kind}"

    @property
    def end(self) -> int:
        """Bytes of the weights' file that belong to finished parts."""
        if not self.count:
            return 0
        found = self.record(self.count - 1).get("end")
        if not isinstance(found, int) or not self.data.is_file() or self.data.stat().st_size < found:
            raise damaged(self.data)
        return found

    def write(
        self,
        record: Mapping[str, Any],
        model: ir.Model,
        outputs: Mapping[str, np.ndarray],
        passed: Mapping[str, HeldArrays | None],
        beside: Sequence[str] = (),
    ) -> None:
        """Keep a further part, whose weights are on the disk already.

        Args:
            record: What else is known about it, JSON values.
            model: Its quantized graph; constants are references to the weights' file.
            outputs: The model's outputs that it makes of the first sample.
            passed: What it passes on, for each stream.
            beside: Names of files that were written for it before.
        """
        number = self.count
        ir.save(model, self._path(number, "onnx"))
        self.write_arrays(f"{number:04d}.outputs.npz", list(outputs.values()))
        for stream, arrays in passed.items():
            with self._path(number, stream).open("wb") as file:
                for array in arrays or ():
                    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        kinds = ("onnx", "outputs.npz", *passed)
        names = [*beside, *(self._path(number, kind).name for kind in kinds)]
        for name in names:
            sync_file(self.folder / name)
        more = {
            "outputs": list(outputs),
            "passed": {stream: 0 if arrays is None else len(arrays) for stream, arrays in passed.items()},
            "files": {name: _digest_of(self.folder / name) for name in names},
        }
        text = json.dumps({**record, **more}, allow_nan=False)
        write_atomically(self._path(number, "json"), text.encode())
        self.count += 1
        for stream in passed if number else ():
            self._path(number - 1, stream).unlink(missing_ok=True)

    def check(self) -> None:
        """Read every file once.

        Raises:
            DataError: One is not as it was written.
        """
        for number in range(self.count):
            record = self.record(number)
            gone = {self._path(number, s).name for s in record["passed"] if number < self.count - 1}
            for name, digest in record["files"].items():
                path = self.folder / name
                if name not in gone and (not path.is_file() or _digest_of(path) != digest):
                    raise damaged(path)

    def record(self, number: int) -> Plain:
        """Return what is known about a part."""
        return _parsed(self._path(number, "json"))

    def model(self, number: int) -> ir.Model:
        """Return a part's graph."""
        return ir.load(self._path(number, "onnx"))

    def outputs(self, number: int) -> dict[str, np.ndarray]:
        """Return the model's outputs that a part makes."""
        arrays = self.arrays(f"{number:04d}.outputs.npz")
        return dict(zip(self.record(number)["outputs"], arrays, strict=True))

    def passed(self, stream: str) -> Iterator[np.ndarray]:
        """Yield what the last part passes on."""
        number = self.count - 1
        with self._path(number, stream).open("rb") as file:
            for _ in range(self.record(number)["passed"][stream]):
                yield np.lib.format.read_array(file, allow_pickle=False)

    def write_arrays(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        """Keep arrays in an .npz file."""
        np.savez(self.folder / name, *arrays, allow_pickle=False)

    def arrays(self, name: str) -> list[np.ndarray]:
        """Return arrays that were kept.

        Raises:
            DataError: The file is damaged.
        """
        path = self.folder / name
        with npz.opened(path) as archive:
            members = npz.headers(archive, path, DEFAULT_LIMITS)
            return [npz.whole(archive, members[f"arr_{k}"]).copy() for k in range(len(members))]

    def write_model(self, name: str, model: ir.Model) -> None:
        """Keep a small model of another kind than a part's."""
        save_model(model, self.folder / name, external=False)

    def read_model(self, name: str) -> ir.Model | None:
        """Return such a model, None if none was kept."""
        path = self.folder / name
        return ir.load(path) if path.is_file() else None


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
