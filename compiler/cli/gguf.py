"""``gguf``: decoders written as GGUF files, such files looked at, their weights put back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place, parse_budget
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.errors import UsageError

if TYPE_CHECKING:
    from bitwright.compiler.to_gguf.export import Written
    from bitwright.compiler.to_gguf.restore import Listing

ENDING = ".gguf"
Budget = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="bits=BITS", help="Choose types by layer, so many bits a weight."),
]


@dataclass(frozen=True)
class Vocabulary:
    """What is written beside the weights.

    Attributes:
        tokenizer: tokenizer.json.
        no_tokenizer: Write none.
        name: Of the model.
        longest: Longest sequence.
    """

    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="FILE.json", help="tokenizer.json; by default the one beside MODEL."
        ),
    ] = None
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Write no tokenizer: token numbers in, token numbers out.")
    ] = False
    name: Annotated[str | None, typer.Option("--name", help="The model's name; by default its file's.")] = (
        None
    )
    longest: Annotated[
        int | None,
        typer.Option(
            "--context", min=1, help="Longest sequence; by default what MODEL's rotary tables hold."
        ),
    ] = None


def gguf_verb(
    out: Output,
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="An ONNX decoder, or a .gguf file to list.", show_default=False),
    ],
    vocabulary: Vocabulary,
    data: arg.Data = None,
    kind: Annotated[
        str, typer.Option("--type", help="F16, Q8_0, q4_K_M, q5_K_S, ...: a mixture of llama.cpp's.")
    ] = "q4_K_M",
    budget: Budget = None,
    pure: Annotated[
        bool, typer.Option("--pure", help="Every matrix gets the type that the mixture usually has.")
    ] = False,
    feedback: Annotated[
        bool, typer.Option("--feedback", help="GPTQ: columns make good others' errors; needs --data.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE.gguf", help="Write MODEL with this file's weights instead."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The .gguf file to write; with --weights the .onnx file."),
    ] = None,
    threads: arg.ComputingThreads = 1,
) -> None:
    """Write an ONNX decoder of the llama family as a GGUF file; or list one, or put its weights back."""
    from bitwright.compiler.to_gguf.export import Request, export_gguf
    from bitwright.compiler.to_gguf.restore import listing

    if model.suffix == ENDING:
        _refuse_others("only listed", {"--output": output, "--weights": weights, "--data": data})
        _print_listing(out, listing(model))
        return
    place = _place(output, ".onnx" if weights is not None else ENDING)
    if weights is not None:
        _refuse_others("made of its weights as they are", {"--data": data, "--budget": budget})
        _put_back(out, model, weights, place, threads)
        return
    request = Request(
        model,
        place,
        kind,
        _bits(budget),
        data,
        vocabulary.tokenizer,
        vocabulary.no_tokenizer,
        vocabulary.name,
        vocabulary.longest,
        pure,
        threads,
        feedback,
    )
    with TerminalProgress(out) as progress:
        written = export_gguf(request, progress)
    _print_written(out, written)
    _result(out, written.to_dict(), place)


def _refuse_others(why: str, given: dict[str, object]) -> None:
    """Refuse options that would mean nothing for a GGUF file that is there."""
    for option, value in given.items():
        if value:
            what = f"a GGUF file that is given is {why}"
            raise UsageError(what, where=option, fix=f"leave {option} out")


def _put_back(out: Output, model: Path, weights: Path, place: Path, threads: int) -> None:
    from bitwright.compiler.to_gguf.restore import restore

    proof = restore(model, weights, place, threads=threads)
    out.say(f"recognised; logits of its parts within {proof:.2g} of the graph's")
    _result(out, {"model": place, "logits_difference": proof}, place)


def _place(output: Path | None, ending: str) -> Path:
    if output is None:
        what = "no output file"
        raise UsageError(what, where="--output", fix=f"pass -o FILE{ending}")
    if output.suffix != ending:
        what = f"the file's name must end in {ending}"
        raise UsageError(what, where=f"--output {output}", fix=f"write {output.with_suffix(ending).name}")
    check_place(output, "--output")
    return output


def _bits(budget: list[str] | None) -> float | None:
    """Return the bits of a weight that may be spent."""
    found = parse_budget(budget or ())
    other = next((name for name in found if name != "bits"), None)
    if other is not None:
        what = f"a GGUF file has no '{other}' to spend"
        raise UsageError(what, where="--budget", fix="e.g. --budget bits=4.5")
    return found.get("bits")


def _print_written(out: Output, written: Written) -> None:
    counts: dict[str, int] = {}
    for tensor in written.tensors:
        counts[tensor.kind] = counts.get(tensor.kind, 0) + 1
    entries = [
        ("type", written.kind),
        ("size", f"{written.bytes / 2**20:.2f} MiB, {written.bits:.3f} bits for each weight"),
        ("tensors", ", ".join(f"{count} {name}" for name, count in counts.items())),
        ("recognised", f"logits of its parts within {written.proof:.2g} of the graph's"),
    ]
    out.facts("GGUF", entries)
    if out.verbose:
        rows = [(t.name, t.kind, "x".join(map(str, t.shape)), f"{t.sqnr_db:.1f}") for t in written.tensors]
        out.table("Tensors", ("Tensor", "Type", "#Shape", "#dB"), rows)
    for note in written.notes:
        out.say(note, "dim")


def _print_listing(out: Output, found: Listing) -> None:
    out.facts(f"Metadata of version {found.version}", sorted(found.metadata.items()))
    rows = [(t.name, t.kind.name, "x".join(map(str, t.shape)), str(t.bytes)) for t in found.tensors]
    out.table("Tensors", ("Tensor", "Type", "#Shape", "#Bytes"), rows)
    if out.json:
        out.document(found.to_dict())
    else:
        out.text(f"{found.bits:.3f} bits for each weight")


def _result(out: Output, document: object, place: Path) -> None:
    if out.json:
        out.document(document)
    else:
        out.path(place)
