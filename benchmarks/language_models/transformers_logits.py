"""Logits of small decoders as the transformers library computes them: what the exporter's are compared with.

Not run by the tests, which read what it wrote; it needs torch and transformers beside Bitwright::

    python benchmarks/language_models/transformers_logits.py tests/golden/transformers_logits.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/null"))
from checkpoints import COMPARED, CheckpointSizes, compared_tokens, write_checkpoint

# Enough to tell any difference: all layers and positions are in the last ones' logits.
POSITIONS, ENTRIES = (0, 11, 47), 12


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return float32 logits, shape (length, vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.from_numpy(tokens[None])).logits[0].numpy()
    return found


def case(sizes: CheckpointSizes, dtype: str) -> list[list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        found = logits(write_checkpoint(Path(folder), sizes, dtype=dtype), compared_tokens(sizes))
    return [[round(float(v), 6) for v in found[p, :ENTRIES]] for p in POSITIONS]


def main(output: Path) -> None:
    import torch
    import transformers

    cases = {name: case(sizes, dtype) for name, (sizes, dtype) in COMPARED.items()}
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, eager attention"
    text = json.dumps({"made_by": made_by, "positions": POSITIONS, "cases": cases}, indent=1)
    output.write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
