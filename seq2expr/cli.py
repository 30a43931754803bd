"""The command line: each command is a thin layer over the function of the same name."""

import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.progress import is_main_process

app = typer.Typer(
    help="Gene expression from DNA, and the regions that drive it. --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SOME_SKIPPED = 3

Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
Data = Annotated[
    str | None, typer.Option("--data", help="Data file, or the name of an installed one.")
]
Root = Annotated[
    Path | None, typer.Option("--root", help="What relative paths in the data file start from.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.epochs=5."),
]


@app.command()
def demo(out: Out = Path("demo")) -> None:
    """Simulate a genome, train on it, predict a gene list, and write a report. Offline."""
    from seq2expr.showcase import demo

    result = demo(out)
    _say(result.summary)
    _say(f"Look at {result.report}; predictions are in {result.expression}.")


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="System file, or the name of an installed one.")
    ],
    out: Out,
    data: Data = None,
    root: Root = None,
    overrides: Overrides = None,
) -> None:
    """Train a system on genome, annotation, tracks and expression."""
    from seq2expr.learn.train import train

    run = train(config, data=data, root=root or Path(), overrides=overrides or (), out=out)
    _say(
        f"Trained {run}. Next: "
        f"seq2expr predict {run} --genome FA --gtf GTF --genes all --out expr.tsv"
    )


@app.command()
def predict(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory or hub id.")],
    genome: Annotated[Path, typer.Option(help="FASTA, plain or gzip.")],
    gtf: Annotated[Path, typer.Option(help="Annotation (GTF), plain or gzip.")],
    out: Out,
    genes: Annotated[
        str, typer.Option(help="all, a comma list, or a file of ids or names.")
    ] = "all",
    track: Annotated[
        list[str] | None, typer.Option(metavar="NAME=BIGWIG", help="One input track.")
    ] = None,
    features: Annotated[Path | None, typer.Option(help="TSV of further gene features.")] = None,
    tss: Annotated[
        Path | None, typer.Option(help="TSV of TSS positions (gene_id, tss; 0-based).")
    ] = None,
    contacts: Annotated[
        Path | None, typer.Option(help="TSV of contact vectors (gene_id, start, end, value).")
    ] = None,
    blacklist: Annotated[Path | None, typer.Option(help="BED of bases that are masked.")] = None,
    chrom_map: Annotated[
        str | None, typer.Option(help="auto, or a TSV of chromosome names.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash all inputs again.")] = False,
) -> None:
    """Predict expression of genes."""
    from seq2expr.learn.predict import predict

    result = predict(
        run, genome=genome, gtf=gtf, genes=genes, tracks=_pairs(track, "--track"),
        features=features, tss=tss, contacts=contacts, blacklist=blacklist, chrom_map=chrom_map,
        out=out, verify=verify,
    )  # fmt: skip
    _say(
        f"Predicted {result.n:,} genes into {out} "
        f"({result.padded:,} windows pass a chromosome end)."
    )
    if len(result.skipped):
        _say(f"{len(result.skipped):,} could not be predicted; reasons are in {out}.skipped.tsv.")
        raise typer.Exit(SOME_SKIPPED)


@app.command()
def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="RUN|PREDICTIONS", help="A run, or a table of predictions.")
    ],
    truth: Annotated[Path, typer.Option(help="Table of measurements.")],
    out: Out,
    run: Annotated[Path | None, typer.Option(help="The run that made the predictions.")] = None,
    data: Data = None,
    root: Root = None,
    twin: Annotated[
        list[str] | None, typer.Option(metavar="NAME=RUN", help="A further run to compare with.")
    ] = None,
) -> None:
    """Score a run or predictions, with every control beside them."""
    from seq2expr.learn.evaluate import evaluate

    found = evaluate(
        what, truth=truth, run=run, data=data, root=root, twins=_pairs(twin, "--twin"), out=out
    )
    _say(found.summary())


@app.command(name="list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="systems or backbones; both by default.")
    ] = None,
) -> None:
    """List what can be named in a configuration."""
    from seq2expr.registry import LISTS

    if what is not None and what not in LISTS:
        raise UserError(f"Cannot list {what!r}; choose from {', '.join(LISTS)}.")
    for name in [what] if what else LISTS:
        _say(f"{name}:")
        for entry in LISTS[name]:
            _say("  " + "\n      ".join(entry))


def main() -> None:
    """Run the command line; see :class:`seq2expr.errors.UserError` for exit code 2."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("seq2expr").setLevel(logging.DEBUG if debug else logging.INFO)
    warnings.showwarning = _show_warning
    try:
        app(prog_name="seq2expr")
    except UserError as error:
        _fail(error, str(error), code=2, debug=debug)
    except Exception as error:  # noqa: BLE001 - the last resort: name the defect, exit with 1
        what = f"internal error, {type(error).__name__}: {error}. Run again with --debug."
        _fail(error, what, code=1, debug=debug)


def _fail(error: Exception, message: str, *, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    typer.echo(f"seq2expr: {message}", err=True)
    sys.exit(code)


def _say(text: str) -> None:
    if is_main_process():
        typer.echo(text)


def _pairs(texts: list[str] | None, flag: str) -> dict[str, str]:
    """Split ``NAME=VALUE`` options."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{flag} takes NAME=PATH; got {text!r}.")
        if name in pairs:
            raise UserError(f"{flag} names {name!r} twice; give each name once.")
        pairs[name] = value
    return pairs


def _show_warning(message: Any, category: type[Warning], *_: Any) -> None:
    """Show our own warnings as one line, and nobody else's."""
    if issubclass(category, Seq2ExprWarning) and is_main_process():
        typer.echo(f"warning: {message}", err=True)
