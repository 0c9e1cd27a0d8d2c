"""The door to training: PyTorch is loaded behind it, and not before."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from bitwright.compiler.errors import ToolchainError

if TYPE_CHECKING:
    from bitwright.compiler.compilation import Progress
    from bitwright.compiler.options import Options
    from bitwright.compiler.training.request import Training
    from bitwright.compiler.training.train import Trained


def train(options: Options, training: Training, progress: Progress | None = None) -> Trained:
    """Train a model as it will be rounded; see :func:`bitwright.compiler.training.train.train_model`.

    Raises:
        ToolchainError: PyTorch is not installed.
        BitwrightError: See the subclasses.
    """
    if find_spec("torch") is None:
        what = "PyTorch is not installed"
        raise ToolchainError(what, where="train", fix="pip install bitwright[qat]")
    from bitwright.compiler.training.train import train_model

    return train_model(options, training, progress)
