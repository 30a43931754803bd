"""The command line: each command is a thin layer over the function of the same name."""

import logging
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.progress import is_main_process

app = typer.Typer(
    help="Gene expression from DNA and from H&E slides, and what drives it. --debug shows "
    "tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SOME_SKIPPED = 3

_HOW = {
    False: "--genome FA --gtf GTF --genes all --out expr.tsv",
    True: "--slide IMAGE --spots FILE --out expr.h5ad",
}
"""How a run is asked, by whether it reads slides."""

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

Run = Annotated[
    str, typer.Argument(metavar="RUN", help="Run directory, hub id or directory of an adapter.")
]
Adapter = Annotated[Path | None, typer.Option(help="Directory of an adapter on the run.")]
Genome = Annotated[Path | None, typer.Option("--genome", help="FASTA, plain or gzip.")]
Gtf = Annotated[Path | None, typer.Option("--gtf", help="Annotation (GTF), plain or gzip.")]
Slide = Annotated[
    Path | None, typer.Option("--slide", help="Picture of a slide, at full resolution.")
]
Spots = Annotated[Path | None, typer.Option("--spots", help="Table of the spots of the slide.")]
GridUm = Annotated[
    float | None, typer.Option("--grid-um", help="Instead of spots: a grid over the tissue, µm.")
]
Mpp = Annotated[float | None, typer.Option("--mpp", help="µm per pixel of the slide.")]
PitchUm = Annotated[
    float | None,
    typer.Option("--pitch-um", help="Distance of neighbouring spots, if unusual for the format."),
]
SlideId = Annotated[str | None, typer.Option("--slide-id", help="Name of the slide.")]
AllSpots = Annotated[
    bool, typer.Option("--all-spots", help="Also spots that are not marked as selected.")
]
Samples = Annotated[
    bool, typer.Option("--samples", help="Keep the samples of a run that draws any (stem).")
]
Genes = Annotated[
    str | None, typer.Option("--genes", help="all, a comma list, or a file of ids or names.")
]
Tracks = Annotated[
    list[str] | None, typer.Option("--track", metavar="NAME=BIGWIG", help="One input track.")
]
Features = Annotated[Path | None, typer.Option("--features", help="TSV of further gene features.")]
Tss = Annotated[
    Path | None, typer.Option("--tss", help="TSV of TSS positions (gene_id, tss; 0-based).")
]
Contacts = Annotated[
    Path | None,
    typer.Option("--contacts", help="TSV of contact vectors (gene_id, start, end, value)."),
]
Blacklist = Annotated[
    Path | None, typer.Option("--blacklist", help="BED of bases that are masked.")
]
Text = Annotated[list[Path] | None, typer.Option("--text", help="Table of gene descriptions.")]
ChromMap = Annotated[
    str | None, typer.Option("--chrom-map", help="auto, or a TSV of chromosome names.")
]
At = Annotated[
    str | None, typer.Option("--at", help="Comma list of spots to explain; some by default.")
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Comma list of mask (the default), inputxgrad, ig, ism, block, deeplift, occlusion, "
        "bingrad, binocclusion, attention; or none. Of slides: gradient, occlusion.",
    ),
]
Verify = Annotated[bool, typer.Option("--verify", help="Hash all inputs again.")]


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
    """Train a system on a genome with its genes, or on slides with their spots."""
    from seq2expr.verbs import is_on_slides, train

    run = train(config, data=data, root=root or Path(), overrides=overrides or (), out=out)
    _say(f"Trained {run}. Next: seq2expr predict {run} {_HOW[is_on_slides(run)]}")


@app.command()
def finetune(
    run: Run,
    data: Annotated[str, typer.Option(help="Data file with the new targets and split.")],
    out: Out,
    adapter: Annotated[str, typer.Option(help="lora, dora, ia3, head or full.")] = "lora",
    root: Root = None,
    overrides: Overrides = None,
    merge: Annotated[
        Path | None, typer.Option(help="Also write an ordinary run, with the adapter merged in.")
    ] = None,
) -> None:
    """Take a trained run to other targets with an adapter."""
    from seq2expr.verbs import finetune, is_on_slides

    made = finetune(
        run, data=data, adapter=adapter, root=root or Path(), overrides=overrides or (), out=out,
        merge=merge,
    )  # fmt: skip
    _say(f"Fine-tuned {made}. Next: seq2expr predict {made} {_HOW[is_on_slides(made)]}")


@app.command()
def predict(
    run: Run,
    out: Out,
    genome: Genome = None,
    gtf: Gtf = None,
    slide: Slide = None,
    spots: Spots = None,
    grid_um: GridUm = None,
    mpp: Mpp = None,
    pitch_um: PitchUm = None,
    slide_id: SlideId = None,
    all_spots: AllSpots = False,
    samples: Samples = False,
    data: Data = None,
    root: Root = None,
    adapter: Adapter = None,
    genes: Genes = "all",
    track: Tracks = None,
    features: Features = None,
    tss: Tss = None,
    contacts: Contacts = None,
    blacklist: Blacklist = None,
    text: Text = None,
    chrom_map: ChromMap = None,
    verify: Verify = False,
) -> None:
    """Predict expression of genes of a genome, or of spots of a slide."""
    from seq2expr.verbs import predict

    result = predict(
        run, adapter=adapter, genome=genome, gtf=gtf, genes=genes, slide=slide, spots=spots,
        grid_um=grid_um, mpp=mpp, pitch_um=pitch_um, slide_id=slide_id,
        all_spots=all_spots or None, samples=samples or None, data=data, root=root,
        tracks=_pairs(track, "--track") or None, features=features, tss=tss, contacts=contacts,
        blacklist=blacklist, text=text, chrom_map=chrom_map, out=out, verify=verify,
    )  # fmt: skip
    _say(f"Predicted {result.describe(out)}.")
    _say_skipped(len(result.skipped), out)


@app.command()
def interpret(
    run: Run,
    out: Out,
    genome: Genome = None,
    gtf: Gtf = None,
    slide: Slide = None,
    spots: Spots = None,
    grid_um: GridUm = None,
    mpp: Mpp = None,
    pitch_um: PitchUm = None,
    slide_id: SlideId = None,
    all_spots: AllSpots = False,
    at: At = None,
    data: Data = None,
    root: Root = None,
    adapter: Adapter = None,
    genes: Genes = None,
    track: Tracks = None,
    features: Features = None,
    tss: Tss = None,
    contacts: Contacts = None,
    blacklist: Blacklist = None,
    text: Text = None,
    chrom_map: ChromMap = None,
    verify: Verify = False,
    method: Method = None,
    target: Annotated[str | None, typer.Option(help="Target to explain; the first.")] = None,
    delete: Annotated[Path | None, typer.Option(help="BED of stretches to delete.")] = None,
    insert: Annotated[
        Path | None, typer.Option(help="TSV of sequences to insert (chrom, position, sequence).")
    ] = None,
    variants: Annotated[Path | None, typer.Option(help="VCF of variants to score.")] = None,
    motifs: Annotated[
        list[Path] | None, typer.Option(help="Motif file: MEME, TRANSFAC or JASPAR.")
    ] = None,
    peaks: Annotated[
        list[Path] | None, typer.Option(help="Peaks (BED) or scores (bigWig) to compare with.")
    ] = None,
    fragments: Annotated[
        Path | None, typer.Option(help="Fragments (BED, BEDPE, BAM) to run MACS3 on.")
    ] = None,
    truth: Annotated[Path | None, typer.Option(help="BED of true elements to score by.")] = None,
    bases: Annotated[Path | None, typer.Option(help="BED of bases that ism changes.")] = None,
    overrides: Overrides = None,
) -> None:
    """Say what drives genes: which stretches of DNA, or which parts of the tissue."""
    from seq2expr.verbs import interpret

    result = interpret(
        run, adapter=adapter, genome=genome, gtf=gtf, genes=genes, slide=slide, spots=spots,
        grid_um=grid_um, mpp=mpp, pitch_um=pitch_um, slide_id=slide_id,
        all_spots=all_spots or None, at=_names(at) if at else None, data=data, root=root,
        tracks=_pairs(track, "--track") or None, features=features, tss=tss, contacts=contacts,
        blacklist=blacklist, text=text, chrom_map=chrom_map,
        methods=_names(method) if method else None, target=target, delete=delete, insert=insert,
        variants=variants, motifs=motifs, peaks=peaks, fragments=fragments, truth=truth,
        bases=bases, overrides=overrides, out=out, verify=verify,
    )  # fmt: skip
    _say(result.summary)
    _say(f"Look at {result.report}.")
    _say_skipped(len(result.skipped), out)


@app.command()
def evaluate(
    what: Annotated[
        str, typer.Argument(metavar="RUN|PREDICTIONS", help="A run, or a table of predictions.")
    ],
    out: Out,
    truth: Annotated[
        Path | None, typer.Option(help="Measurements: a table of genes, or an h5ad of spots.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run that made the predictions.")] = None,
    data: Data = None,
    root: Root = None,
    twin: Annotated[
        list[str] | None, typer.Option(metavar="NAME=RUN", help="A further run to compare with.")
    ] = None,
) -> None:
    """Score a run or predictions, with every control beside them."""
    from seq2expr.verbs import evaluate

    found = evaluate(
        what, truth=truth, run=run, data=data, root=root, twins=_pairs(twin, "--twin"), out=out
    )
    _say(found.summary())


@app.command()
def benchmark(
    protocol: Annotated[
        str,
        typer.Argument(metavar="PROTOCOL", help="Protocol, or the name of an installed one."),
    ],
    out: Out,
    data: Data = None,
    root: Root = None,
    systems: Annotated[
        str | None, typer.Option(help="Comma list of rows of the protocol; all by default.")
    ] = None,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; they share the cores.")] = 1,
) -> None:
    """Train rows of a protocol over folds and seeds, and compare them, paired over genes."""
    from seq2expr.bench.run import benchmark

    found = benchmark(
        protocol, data=data, root=root or Path(), systems=_names(systems) if systems else None,
        overrides=overrides or (), jobs=jobs, out=out,
    )  # fmt: skip
    _say(found.summary())
    _say(f"Look at {found.report}.")
    _say_skipped(len(found.failed), out)


@app.command(name="list")
def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="systems, backbones, trunks, encoders or llms; all by default."),
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
    warnings.showwarning = _shower()
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


def _say_skipped(count: int, out: Path) -> None:
    """Point to what could not be done, and end with the exit code that says so."""
    if count:
        _say(f"{count:,} could not be done; the reasons are in {out}.skipped.tsv.")
        raise typer.Exit(SOME_SKIPPED)


def _names(text: str) -> list[str]:
    """Split a comma list; ``none`` is an empty one."""
    return [] if text == "none" else [name.strip() for name in text.split(",")]


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


def _shower() -> Callable[..., None]:
    """Return what shows our own warnings as one line each, once, and nobody else's."""
    shown: set[str] = set()  # Python forgets what it showed whenever a filter changes

    def show(message: Any, category: type[Warning], *_: Any) -> None:
        text = f"warning: {message}"
        if issubclass(category, Seq2ExprWarning) and is_main_process() and text not in shown:
            shown.add(text)
            typer.echo(text, err=True)

    return show
