"""What firmware needs beside the command stream: the file as a C array, and how inputs and outputs are quantized."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from bitwright.targets.ethos_u.tflite_graph import Stored, TfliteGraph

BYTES_A_LINE = 16
HEADER_FILE, SOURCE_FILE = "model_vela.h", "model_vela.c"

HEADER = """\
/* {title}: a model for {accelerator}, to be given to TensorFlow Lite Micro with its Ethos-U operator. */
#ifndef BITWRIGHT_MODEL_VELA_H
#define BITWRIGHT_MODEL_VELA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

/* Content of model_vela.tflite, aligned to 16 bytes. */
extern const uint8_t bitwright_model[];
extern const size_t bitwright_model_bytes;

/* Bytes of SRAM that Vela has planned: the tensor arena, where the memory mode puts it there. The interpreter needs
   some of its own on top. */
#define BITWRIGHT_SRAM_BYTES {sram}

{tensors}
/* real = (integer - zero_point) * scale */
static inline int8_t bitwright_quantize(float real, float scale, int32_t zero_point) {{
  const float steps = real / scale + (float)zero_point;
  if (!(steps > -128.0f)) return -128;
  if (steps >= 127.0f) return 127;
  return (int8_t)(steps < 0.0f ? steps - 0.5f : steps + 0.5f);
}}

static inline float bitwright_dequantize(int8_t integer, float scale, int32_t zero_point) {{
  return (float)(integer - zero_point) * scale;
}}

#ifdef __cplusplus
}}
#endif

#endif
"""


def write_firmware(
    folder: Path, graph: TfliteGraph, optimised: bytes, accelerator: str, sram: int
) -> list[Path]:
    """Write a header and a C source; returns their names.

    Args:
        folder: Where.
        graph: Knows inputs and outputs.
        optimised: Content of the file that Vela wrote.
        accelerator: For the comment.
        sram: Bytes of SRAM that Vela has planned.
    """
    lines = [
        *_described("INPUT", graph.inputs, graph),
        *_described("OUTPUT", graph.outputs, graph),
    ]
    text = HEADER.format(title=HEADER_FILE, accelerator=accelerator, sram=sram, tensors="\n".join(lines))
    (folder / HEADER_FILE).write_text(text)
    (folder / SOURCE_FILE).write_text(_array(optimised))
    return [Path(HEADER_FILE), Path(SOURCE_FILE)]


def _described(word: str, tensors: Mapping[str, Stored], graph: TfliteGraph) -> Iterator[str]:
    for number, (name, stored) in enumerate(tensors.items()):
        tensor = graph.tensors[stored.tensor]
        prefix = f"BITWRIGHT_{word}_{number}"
        shape = " x ".join(map(str, tensor.shape))
        yield f"/* {word.lower()} {number}, '{_comment(name)}': int8, {shape}{_order(stored)} */"
        yield f"#define {prefix}_ELEMENTS {_product(tensor.shape)}"
        yield f"#define {prefix}_SCALE {float(tensor.scale[0])!r}f"
        yield f"#define {prefix}_ZERO_POINT ({tensor.zero_point})"
        yield ""


def _order(stored: Stored) -> str:
    if stored.is_row_major:
        return ""
    return f"; axes of the ONNX tensor, outermost first: {', '.join(map(str, stored.order))}"


def _comment(name: str) -> str:
    """Keep a name from a model from ending the comment that it stands in."""
    return re.sub(r"[^A-Za-z0-9_.:/ -]", "_", name).replace("*/", "__").replace("/*", "__")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _array(content: bytes) -> str:
    lines = [
        ", ".join(f"0x{byte:02x}" for byte in content[k : k + BYTES_A_LINE])
        for k in range(0, len(content), BYTES_A_LINE)
    ]
    return (
        f'#include "{HEADER_FILE}"\n\n'
        "#if defined(__cplusplus)\nalignas(16)\n#else\n_Alignas(16)\n#endif\n"
        "const uint8_t bitwright_model[] = {\n  " + ",\n  ".join(lines) + "\n};\n\n"
        "const size_t bitwright_model_bytes = sizeof bitwright_model;\n"
    )
