"""``generate`` and ``evaluate``: what a decoder writes, and how well it predicts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.errors import UsageError, printable

if TYPE_CHECKING:
    from bitwright.compiler.decoding.sampling import Sampling
    from bitwright.compiler.generation.comparison import Comparison
    from bitwright.compiler.generation.generate import Generation

Decoder = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="An ONNX decoder, the folder with one, or what 'bitwright compile --context' wrote.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
        prompt: Text.
        tokens: Token numbers instead.
        tokenizer: tokenizer.json.
        chat: The text is a message.
        system: What the model is told before it.
    """

    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Text to be continued.")
    ] = None
    tokens: Annotated[
        str | None,
        typer.Option("--tokens", metavar="1,2,3", help="Token numbers to be continued; needs no tokenizer."),
    ] = None
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="FILE.json", help="tokenizer.json; by default the one beside MODEL."
        ),
    ] = None
    chat: Annotated[
        bool,
        typer.Option("--chat", help="The prompt is a message: put it into the model's chat template."),
    ] = False
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="What a chat begins with.")
    ] = None

    def numbers(self) -> tuple[int, ...] | None:
        """Return the token numbers.

        Raises:
            UsageError: They are not written as they should be.
        """
        if self.tokens is None:
            return None
        words = [word.strip() for word in self.tokens.split(",")]
        wrong = next((word for word in words if not re.fullmatch("[0-9]{1,9}", word)), None)
        if wrong is not None:
            what = f"'{wrong}' is no token number"
            raise UsageError(what, where="--tokens", fix="write whole numbers with commas, e.g. 1,2,3")
        return tuple(map(int, words))


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen.

    Attributes:
        max_tokens: At most so many.
        temperature: 0 takes the most probable token.
        top_k: Only the most probable ones.
        top_p: Only the most probable ones up to this sum.
        seed: Of the draws.
    """

    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="Generate at most so many.")] = 64
    temperature: Annotated[
        float, typer.Option("--temperature", help="Draw tokens; 0 takes the most probable one each time.")
    ] = 0.0
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Draw from so many of the most probable tokens.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Draw from the most probable tokens that sum up to this share."),
    ] = None
    seed: Annotated[int, typer.Option("--seed", help="Equal seeds draw equal tokens.")] = 0

    def sampling(self) -> Sampling:
        """Return how tokens are chosen.

        Raises:
            UsageError: An option is out of its range, or means nothing beside the others.
        """
        from bitwright.compiler.decoding.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


def generate_verb(
    out: Output,
    model: Decoder,
    prompt: Prompt,
    choice: Choice,
    other: Annotated[
        Path | None,
        typer.Option("--compare", metavar="OTHER", help="Let another model continue the same, and compare."),
    ] = None,
    threads: arg.ComputingThreads = 1,
) -> None:
    """Let a decoder, an ONNX file or compiled, continue a text; show it as it comes, and tokens a second."""
    from bitwright.compiler.generation.comparison import compare
    from bitwright.compiler.generation.generate import Request, generate

    request = Request(
        model,
        prompt.prompt,
        prompt.numbers(),
        prompt.tokenizer,
        choice.max_tokens,
        choice.sampling(),
        threads,
        prompt.chat,
        prompt.system,
    )
    if other is not None:
        with TerminalProgress(out) as progress:
            progress.phase("generate with both")
            compared = compare(request, other)
        _print_comparison(out, compared)
        return
    written = None if out.json else _Screen(out)
    if written is not None and prompt.prompt is not None:
        written.prompt(prompt.prompt)
    found = generate(request, written)
    if out.json:
        out.document(found.to_dict())
        return
    out.text("")
    _print_speed(out, [found])


class _Screen:
    """Writes pieces of text to stdout at once: to a file as they are, to a terminal without what could drive it."""

    def __init__(self, out: Output) -> None:
        self._stream = out.stdout
        self._terminal = out.stdout.isatty()
        self._console = Console(file=out.stdout, markup=False, highlight=False, emoji=False)

    def prompt(self, text: str) -> None:
        """Show the prompt on a terminal."""
        if self._terminal:
            self._console.print(_safe(text, "dim"), end="", soft_wrap=True)

    def __call__(self, piece: str) -> None:
        if self._terminal:
            self._console.print(_safe(piece), end="", soft_wrap=True)
        else:
            self._stream.write(piece)
        self._stream.flush()


def _safe(text: str, style: str = "") -> Text:
    return Text("\t".join(printable(part) for part in text.split("\t")), style)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _print_speed(out: Output, found: list[Generation]) -> None:
    rows = [
        (
            g.model.name if len({f.model.name for f in found}) > 1 else str(g.model),
            str(len(g.prompt)),
            _rate(g.prompt_rate),
            str(len(g.tokens)),
            _rate(g.rate),
            g.reason,
        )
        for g in found
    ]
    columns = ("Model", "#Prompt", "#Tokens/s", "#Generated", "#Tokens/s", "Ended by")
    out.table("", columns, rows)
    for note in dict.fromkeys(note for g in found for note in g.notes):
        out.say(note, "dim")


def _print_comparison(out: Output, found: Comparison) -> None:
    if out.json:
        out.document(found.to_dict())
        return
    both = [found.first, found.second]
    if out.speaks:
        out.console.print(_side_by_side(both))
    _print_speed(out, both)
    out.text(found.verdict())


def _side_by_side(found: list[Generation]) -> Table:
    """Return both texts in full: long words are broken rather than cut."""
    table = Table(box=None, pad_edge=False)
    for g in found:
        table.add_column(Text(printable(g.model)), overflow="fold", ratio=1)
    table.add_row(*(_safe(" ".join(map(str, g.tokens)) if g.text is None else g.text) for g in found))
    return table


def evaluate_verb(
    out: Output,
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="An ONNX model, or the folder with one.", show_default=False),
    ],
    metric: Annotated[
        str,
        typer.Option(
            "--eval",
            metavar="METRIC",
            help="perplexity:TOKENS.npz, perplexity:TEXT.txt,tokenizer=FILE.json, or FILE.py:FUNC.",
        ),
    ],
    threads: arg.ComputingThreads = 1,
) -> None:
    """Measure a metric of a model as it stands: perplexity, or your own function."""
    from bitwright.compiler.evaluation import evaluate_model

    with TerminalProgress(out) as progress:
        progress.phase("evaluate")
        found = evaluate_model(model, metric, threads=threads)
    if out.json:
        out.document(found.to_dict())
        return
    parts = found.perplexity
    if parts is None:
        out.text(f"{found.value:.6g}")
        return
    bits = "unknown: no bytes_per_token" if parts.bits_per_byte is None else f"{parts.bits_per_byte:.4f}"
    entries = [
        ("perplexity", f"{parts.perplexity:.4f}"),
        ("nats a token", f"{parts.nll:.5f}"),
        ("bits a byte", bits),
        ("tokens", f"{parts.tokens} predicted, {parts.tokens / found.seconds:.0f} a second"),
    ]
    out.facts(str(found.model), entries)
    out.text(f"{parts.perplexity:.4f}")
