"""Gene expression from DNA and from H&E slides, the regions that drive it, and adapters."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_PUBLIC = {
    "Batch": "seq2expr.model.batch",
    "Benchmark": "seq2expr.bench.run",
    "Ensemble": "seq2expr.model.system",
    "Evaluation": "seq2expr.learn.evaluate",
    "ExpressionHead": "seq2expr.model.heads",
    "Genome": "seq2expr.dna.genome",
    "Predictions": "seq2expr.learn.predict",
    "Seq2ExprWarning": "seq2expr.errors",
    "SpotEvaluation": "seq2expr.spots.evaluate",
    "SpotPredictions": "seq2expr.spots.predict",
    "System": "seq2expr.model.system",
    "Track": "seq2expr.dna.tracks",
    "UserError": "seq2expr.errors",
    "Windows": "seq2expr.dna.windows",
    "benchmark": "seq2expr.bench.run",
    "demo": "seq2expr.showcase",
    "evaluate": "seq2expr.verbs",
    "finetune": "seq2expr.verbs",
    "gene_table": "seq2expr.dna.genes",
    "interpret": "seq2expr.interpret",
    "load_run": "seq2expr.learn.runs",
    "merge_adapter": "seq2expr.learn.adapters",
    "predict": "seq2expr.verbs",
    "read_gtf": "seq2expr.dna.genes",
    "read_spots": "seq2expr.image.spots",
    "train": "seq2expr.verbs",
}

__all__ = sorted(_PUBLIC)
__version__ = version("seq2expr")


def __getattr__(name: str) -> Any:
    """Load public names on first use: importing the package alone stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
