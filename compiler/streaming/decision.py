"""Whether a model is quantized part by part, and what cannot be."""

from __future__ import annotations

import psutil

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import BitwrightError, UsageError
from bitwright.compiler.frontend import READING
from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.options import STREAMED

# In memory a model exists several times over: the file's pages, a normalized copy, sessions, integers.
SHARE_OF_MEMORY = 4
HALVES = ("fp16", "bf16")
FIX = "leave --stream out, or "


def way_of(c: Compilation) -> str:
    """Return how a model is to be streamed: ``quantized`` or ``float``, or ``off``.

    ``auto`` streams what is larger than a quarter of the memory that is free, if the recipe allows it, and notes why
    where it does not.

    Args:
        c: A compilation whose model was read.

    Raises:
        UsageError: A way was asked for and something else does not go with it.
    """
    assert c.source is not None, "ingest is done"
    asked = c.options.stream
    if c.options.resume:
        if asked == "off":
            what = "a model that is quantized at once has no finished parts"
            raise UsageError(what, where="--resume", fix="leave it out, or name a way: --stream quantized")
        asked = "quantized" if asked == "auto" else asked  # whatever memory is free this time
    if asked in STREAMED:
        found = obstacle(c)
        if found is not None:
            raise found
        return asked
    if asked == "off" or not is_large(weight_bytes(c.source.model)):
        return "off"
    found = obstacle(c)
    if found is None:
        return "quantized"
    c.progress.note(f"the model is large for this memory, but is not streamed: {found.what}")
    return "off"


def is_large(weights: int) -> bool:
    """Tell whether weights of so many bytes are more than a quarter of the free memory."""
    return weights * SHARE_OF_MEMORY > psutil.virtual_memory().available


def obstacle(c: Compilation) -> BitwrightError | None:
    """Return why options or recipe need the whole model at once, or None if they do not."""
    recipe, options = c.recipe.recipe, c.options
    if c.allocates:
        what = "formats chosen under a budget are judged by the outputs of the whole model"
        return UsageError(what, where="--stream", fix=FIX + "name one format by a recipe, e.g. --recipe w4")
    if options.evaluate is not None:
        what = "a metric needs the whole model, float and quantized"
        return UsageError(what, where="--eval", fix=FIX + "evaluate the written model")
    formats = {*recipe.formats, *recipe.nodes.values()}
    static = sorted(formats & {*READING, *HALVES})
    if static:
        what = f"the format {static[0]} passes between layers, also where the model is cut"
        return UsageError(what, where="--recipe", fix=FIX + "take a weight-only or dynamic recipe")
    if recipe.migrate.rotate:
        what = "the rotation of the residual stream changes all layers at once"
        return UsageError(what, where="--recipe", fix=FIX + "set migrate: {rotate: false} in the recipe")
    return None
