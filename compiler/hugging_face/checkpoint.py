"""A folder with config.json and safetensors: which tensors there are, each read when it is asked for."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.hugging_face.config import Config, read_config
from bitwright.compiler.hugging_face.json_file import read_object
from bitwright.compiler.hugging_face.names import DERIVED, HEAD, Part, parts_of
from bitwright.compiler.hugging_face.safetensors import SafetensorsFile
from bitwright.compiler.llama.decoder import HyperParameters
from bitwright.compiler.llama.tensors import interleaved

Float32 = NDArray[np.float32]
ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARDS = 4096
ENDING = ".safetensors"
FACTORS = "rope_freqs.weight"


class Checkpoint:
    """An open folder; nothing of the weights is in memory until it is asked for.

    Attributes:
        folder: The folder.
        config: Its config.json.
        hyper: Sizes and constants of the decoder.
        parts: The tensors by GGUF's names, the embedding first, then layer by layer.
    """

    def __init__(self, folder: Path) -> None:
        """Read the configuration and the headers of all files.

        Raises:
            UsageError: There is no such folder.
            ModelError: A file is missing or malformed, or the tensors are not those of the configuration.
        """
        if not folder.is_dir():
            msg = "there is no such folder"
            raise UsageError(msg, where=str(folder), fix="give a folder with config.json and safetensors")
        self.folder = folder
        self.config: Config = read_config(folder)
        self.hyper: HyperParameters = self.config.hyper()
        self.parts: dict[str, Part] = {p.gguf: p for p in parts_of(self.config)}
        self._files = _tensor_files(folder)
        self._check_tensors()

    def weight(self, name: str) -> Float32 | None:
        """Return a tensor by GGUF's name, in GGUF's order of rows (``llama.tensors.interleaved``).

        Returns:
            float32, in memory of its own; None if the decoder has no such tensor.

        Raises:
            ModelError: It holds NaN or infinity.
        """
        if name == FACTORS:
            return self.hyper.factors
        part = self.parts.get(name)
        if part is None:
            return None
        values = self.read(part)
        return interleaved(values, part.heads) if part.heads else values

    def read(self, part: Part, index: tuple[slice, ...] = ()) -> Float32:
        """Return a tensor, or a part of it, with its rows in the checkpoint's order.

        Args:
            part: One of ``parts``.
            index: What is read of each dimension; nothing else is converted.

        Returns:
            float32, in memory of its own.

        Raises:
            ModelError: It holds NaN or infinity.
        """
        return self._files[part.name].part(part.name, index)

    def dtypes(self) -> frozenset[str]:
        """Return the types that the decoder's tensors are stored in: F32, F16, BF16."""
        return frozenset(self._files[p.name].tensor(p.name).dtype for p in self.parts.values())

    def _check_tensors(self) -> None:
        """Refuse tensors that are missing, of another shape, or that the architecture has no place for."""
        for part in self.parts.values():
            file = self._files.get(part.name)
            if file is None:
                self._refuse(f"the checkpoint has no tensor '{part.name}'")
            shape = file.tensor(part.name).shape
            if shape != part.shape:
                self._refuse(f"tensor '{part.name}' has shape {shape}; config.json says {part.shape}")
        known = {p.name for p in self.parts.values()}
        # A tied head may be stored all the same; the embedding is what counts.
        ignored = {HEAD} if self.config.tied else set()
        strange = [n for n in self._files if n not in known | ignored and not n.endswith(DERIVED)]
        if strange:
            what = f"{self.config.architecture} has no place for tensor '{strange[0]}'"
            self._refuse(f"{what} ({len(strange)} such)" if len(strange) > 1 else what)

    def _refuse(self, what: str) -> NoReturn:
        fix = "check that config.json belongs to this checkpoint, and that the download is complete"
        raise ModelError(what, where=str(self.folder), fix=fix)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a Hugging Face folder of the llama family.

    Args:
        folder: With config.json and model.safetensors, or shards and model.safetensors.index.json.

    Raises:
        UsageError: There is no such folder.
        ModelError: A file is missing or malformed, or the tensors are not those of the configuration.
    """
    return Checkpoint(Path(folder))


def _tensor_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Return the file of every tensor."""
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / ONE_FILE).exists():
            msg = f"there is neither {ONE_FILE} nor {INDEX_FILE}"
            fix = "convert the checkpoint to safetensors; pickled weights (.bin) are not read"
            raise ModelError(msg, where=str(folder), fix=fix)
        file = SafetensorsFile(folder / ONE_FILE)
        return dict.fromkeys(file.tensors, file)
    places = _places(index)
    shards = {name: SafetensorsFile(folder / name) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in shards[name].tensors:
            msg = f"tensor '{tensor}' is not in '{name}', where the index has it"
            raise ModelError(msg, where=str(index), fix="the download is incomplete or mixed; get it anew")
    return {tensor: shards[name] for tensor, name in places.items()}


def _places(index: Path) -> dict[str, str]:
    """Return the file's name of every tensor; files lie in the index's own folder."""
    places = read_object(index).get("weight_map")
    fix = "the file is damaged or made to hurt; get it anew"
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        msg = "has no weight_map from tensors to files"
        raise ModelError(msg, where=str(index), fix=fix)
    names = set(places.values())
    if len(names) > SHARDS:
        msg = f"{len(names)} files; at most {SHARDS} are read"
        raise ModelError(msg, where=str(index), fix=fix)
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name or not name.endswith(ENDING):
            msg = f"'{name[:80]}' is no name of a safetensors file in this folder"
            raise ModelError(msg, where=str(index), fix=fix)
    return places
