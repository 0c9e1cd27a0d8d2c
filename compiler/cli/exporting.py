"""``export``: PyTorch modules and Hugging Face folders as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place
from bitwright.compiler.errors import UsageError

DECODERS = "Decoders"


def export_verb(
    out: Output,
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODULE.py:FACTORY|FOLDER",
            help="FACTORY() returns (module, example inputs); FOLDER has config.json and safetensors.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write.")],
    opset: Annotated[
        int | None, typer.Option("--opset", min=13, max=23, help="ONNX opset of a module; by default 21.")
    ] = None,
    form: Annotated[
        Literal["plain", "cache"] | None,
        typer.Option(
            "--form",
            help="cache (the default): keys and values of earlier tokens go in and out; plain: tokens in, logits out.",
            rich_help_panel=DECODERS,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option("--dtype", help="Of weights and caches; by default float32.", rich_help_panel=DECODERS),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=1,
            help="Longest sequence; by default the checkpoint's.",
            rich_help_panel=DECODERS,
        ),
    ] = None,
    threads: arg.ComputingThreads = 1,
) -> None:
    """Export a PyTorch module or a folder of a decoder to ONNX, and check that ONNX Runtime computes the same."""
    check_place(output, "--output")
    if Path(source).is_dir():
        if opset is not None:
            what = "only modules are exported in an opset of choice"
            raise UsageError(what, where="--opset", fix="leave it out")
        _export_folder(out, Path(source), output, form or "cache", dtype or "float32", context, threads)
        return
    given = {"--form": form, "--dtype": dtype, "--context": context}
    extra = next((name for name, value in given.items() if value is not None), None)
    if extra is not None:
        what = f"is for folders; there is no folder '{source}'"
        raise UsageError(what, where=extra, fix="give a folder with config.json, or leave it out")
    _export_module(out, source, output, opset or 21)


def _export_module(out: Output, factory: str, output: Path, opset: int) -> None:
    from bitwright.compiler.export_torch import export

    found = export(factory, output, opset=opset)
    out.say(f"exported by {found.exporter}; largest difference to PyTorch {found.largest_difference:.3g}")
    if out.json:
        out.document(
            {"model": found.path, "exporter": found.exporter, "largest_difference": found.largest_difference}
        )
    else:
        out.path(found.path)


def _export_folder(
    out: Output,
    folder: Path,
    output: Path,
    form: Literal["plain", "cache"],
    dtype: Literal["float32", "float16"],
    context: int | None,
    threads: int,
) -> None:
    from bitwright.compiler.export_decoder import export_folder

    found = export_folder(folder, output, form=form, dtype=dtype, context=context, threads=threads)
    out.say(
        f"{found.architecture}, {found.parameters / 1e6:.1f} M parameters, up to {found.context} positions"
    )
    if found.largest_difference is None:
        out.say("larger than 1 GiB: its logits were not computed for a check", "dim")
    else:
        out.say(f"logits within {found.largest_difference:.2g} of the checkpoint's in numpy")
    if out.json:
        out.document(
            {
                "model": found.path,
                "companions": list(found.companions),
                "architecture": found.architecture,
                "parameters": found.parameters,
                "context": found.context,
                "largest_difference": found.largest_difference,
            }
        )
        return
    for path in (found.path, *found.companions):
        out.path(path)
