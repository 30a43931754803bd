"""Predict the expression of every spot of a slide: a picture and positions in, an AnnData out."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

from seq2expr.errors import UserError
from seq2expr.image.patches import PatchSpec
from seq2expr.learn.chunks import check_ids, in_chunks
from seq2expr.learn.runs import find_run
from seq2expr.learn.tables import check_out, write_skipped
from seq2expr.model.batch import Prediction, fields_on
from seq2expr.model.spot_system import SpotSystem
from seq2expr.model.system import Ensemble, members_in
from seq2expr.spots.data import SpotSlide
from seq2expr.spots.inputs import keeps_features, open_inputs
from seq2expr.spots.reading import BATCH, SpotReader
from seq2expr.spots.request import open_request
from seq2expr.spots.spread import summarise
from seq2expr.store import digest, file_digest, publish
from seq2expr.text.bank import GeneBank

if TYPE_CHECKING:  # anndata takes a second to import
    from anndata import AnnData

ENDINGS = (".h5ad",)
"""What the name of predictions of spots ends in."""

_OBS = ["slide_id", "patient_id", "array_row", "array_col", "in_tissue"]

LARGE_BATCH = 512
"""Spots of a batch where each reads its whole slide anew."""

PREDICTED = "predicted"
"""Layer of the predictions; further answers are ``predicted_<name>``."""

SAMPLES = f"{PREDICTED}_samples"
"""Samples in ``obsm`` [spots, S, genes], where they are asked for."""

_COUNT = "n_samples"


class Answers(NamedTuple):
    """What a model says of some spots.

    Attributes
    ----------
    values
        Every answer by its layer, float32 [rows, G], ``predicted`` first.
    samples
        float32 [rows, S, G] of the genes that were trained; None of a model that has none.
    """

    values: dict[str, np.ndarray]
    samples: np.ndarray | None


class SpotPredictions(NamedTuple):
    """What a prediction of spots returns.

    Attributes
    ----------
    adata
        Spots × genes with ``layers["predicted"]`` = ``X``, in the units of the label card
        (``uns["seq2expr"]["label"]``). Of a system that samples, ``predicted_sd`` and
        ``predicted_q05``, ``_q25``, ``_q50``, ``_q75`` and ``_q95`` are standard deviation and
        quantiles of ``uns["seq2expr"]["samples"]`` samples. ``None`` when another process wrote
        it.
    n
        Number of predicted spots.
    skipped
        ``name`` and ``reason`` of every spot and gene that was asked for and is not there.
    """

    adata: "AnnData | None"
    n: int
    skipped: pd.DataFrame

    def describe(self, out: Path) -> str:
        """Say in words what was predicted."""
        return f"{self.n:,} spots into {out}"


@dataclass(frozen=True, eq=False)
class SpotPredictor:
    """A loaded run on the spots of some slides.

    Parameters
    ----------
    model
        The system, in evaluation mode.
    slides
        The sections, in order.
    reader
        Of all their spots.
    new
        Genes that were not trained, which are answered by their texts.
    """

    model: SpotSystem | Ensemble
    slides: Sequence[SpotSlide]
    reader: SpotReader
    new: GeneBank | None = None

    @property
    def genes(self) -> list[str]:
        """The genes that are answered, G: those of the run, then the new ones."""
        return [*self.model.config.targets, *(self.new.genes if self.new else ())]

    def answers(self, rows: np.ndarray) -> Iterator[Prediction]:
        """Yield the answers for some rows, a batch at a time, on the CPU."""
        device = next(iter(self.model.state_dict().values())).device
        vectors = None if self.new is None else torch.from_numpy(self.new.vectors).to(device)
        whole = "slide_tokens" in members_in(self.model)[0].config.reads
        for batch in self.reader.batches(rows, LARGE_BATCH if whole else BATCH):
            fields = fields_on(batch, device)
            with torch.inference_mode():
                answer = self.model(**fields)
                mean = answer.mean.float()
                if vectors is not None:
                    further = self.model(**fields, gene_text=vectors).mean.float()
                    mean = torch.cat([mean, further], dim=1)
            other = {name: value.float().cpu() for name, value in (answer.other or {}).items()}
            samples = None if answer.samples is None else answer.samples.float().cpu()
            yield Prediction(mean=mean.cpu(), other=other or None, samples=samples)

    def ask(self, rows: np.ndarray) -> Answers:
        """Return every answer for some rows, and the samples that are behind them."""
        parts: dict[str, list[np.ndarray]] = {}
        samples = []
        for answer in self.answers(rows):
            parts.setdefault(PREDICTED, []).append(answer.mean.numpy())
            for name, value in (answer.other or {}).items():
                parts.setdefault(f"{PREDICTED}_{name}", []).append(value.numpy())
            if answer.samples is not None:
                samples.append(answer.samples.numpy())
        values = {name: np.concatenate(found) for name, found in parts.items()}
        return Answers(values, np.concatenate(samples) if samples else None)

    def predict(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return every answer for some rows, float32 [rows, G], ``predicted`` first."""
        return self.ask(rows).values


def open_predictor(
    model: SpotSystem | Ensemble,
    slides: Sequence[SpotSlide],
    *,
    new: GeneBank | None = None,
    verify: bool = False,
) -> SpotPredictor:
    """Open the slides for a loaded model, which is moved to the GPU where there is one."""
    if torch.cuda.is_available():
        model = model.to("cuda")
    system = members_in(model)[0]
    sight = system.config.sight
    # Where one member has an encoder of its own, all of them read pixels.
    cache = keeps_features(*(member.encoder for member in members_in(model)))
    spec = PatchSpec(um=sight.patch_um, px=sight.patch_px)
    inputs = open_inputs(slides, system.encoder, spec, sight=sight, cache=cache, verify=verify)
    counts = [len(slide.adata) for slide in slides]
    ids = [f"{slide.name}/{spot}" for slide in slides for spot in slide.adata.obs_names]
    reader = SpotReader(
        inputs,
        ids,
        slides=np.repeat(np.arange(len(slides)), counts),
        rows=np.concatenate([np.arange(count) for count in counts]),
    )
    return SpotPredictor(model, slides, reader, new)


def predict_spots(
    run: str | os.PathLike,
    *,
    slide: str | os.PathLike | None = None,
    spots: str | os.PathLike | None = None,
    grid_um: float | None = None,
    mpp: float | None = None,
    pitch_um: float | None = None,
    slide_id: str | None = None,
    data: str | os.PathLike | None = None,
    root: str | os.PathLike = ".",
    genes: str | Sequence[str] = "all",
    text: Sequence[str | os.PathLike] = (),
    adapter: str | os.PathLike | None = None,
    all_spots: bool = False,
    samples: bool = False,
    out: str | os.PathLike | None = None,
    verify: bool = False,
) -> SpotPredictions:
    """Predict expression of the spots of one slide, or of all slides of a data file.

    Parameters
    ----------
    run
        Run directory, hub id or directory of an adapter.
    slide
        Picture of the slide, at full resolution.
    spots
        Positions of its spots (see :func:`seq2expr.image.spots.read_positions`).
    grid_um
        Instead: lay a square grid of this pitch over the tissue.
    mpp
        µm per pixel, where neither picture nor positions say it.
    pitch_um
        Distance between neighbouring spots, where the array is not that of its format.
    slide_id
        Name of the slide; that of the picture by default.
    data, root
        Instead of a slide: a data file of slides, and what its paths are relative to.
    genes
        Genes of the panel to keep: ``all``, names, a comma list, or a file.
    text
        Tables with the texts of further genes among ``genes``, which a run that reads texts then
        answers. Their answers are in standard deviations from their mean, for neither is known
        (``var["trained"]`` is False).
    adapter
        Directory of an adapter on the run.
    all_spots
        Also spots that are not marked as selected or in tissue.
    samples
        Keep the samples of a system that draws any, in ``obsm["predicted_samples"]`` [spots, S,
        genes]: each is of all genes together, and a CRPS needs them.
    out
        ``.h5ad``; what could not be predicted goes to ``<out>.skipped.tsv``.
    verify
        Hash pictures again even where path, size and time are known.

    Raises
    ------
    UserError
        When the request cannot be carried out; nothing is then written.
    """
    target = None if out is None else check_out(out, ENDINGS)
    request = open_request(
        run,
        adapter=adapter,
        slide=slide,
        spots=spots,
        grid_um=grid_um,
        mpp=mpp,
        pitch_um=pitch_um,
        slide_id=slide_id,
        data=data,
        root=root,
        genes=genes,
        text=text,
        all_spots=all_spots,
    )
    if samples and not request.model.config.draws:
        raise UserError(
            f"--samples (samples=True) is given, and {run} answers each gene by one number. Leave "
            "it out, or ask a run of stem (model.objective=diffusion)."
        )
    predictor = open_predictor(request.model, request.slides, new=request.new, verify=verify)
    genes = [*request.genes, *(request.new.genes if request.new else ())]
    made_by = find_run(run if adapter is None else adapter)
    asked = genes if request.new is None else [*genes, request.new.hash]
    asked = [*asked, SAMPLES] if samples else asked
    identity = _identity(made_by, request.slides, asked)
    make = partial(all_answers, predictor, genes, samples=samples)
    adata = _predicted(predictor, genes, make, target, identity, request.skipped)
    return SpotPredictions(adata, len(predictor.reader.ids), request.skipped)


def _predicted(
    predictor: SpotPredictor,
    genes: list[str],
    make: Callable[[slice], pd.DataFrame],
    target: Path | None,
    request: str,
    skipped: pd.DataFrame,
) -> "AnnData | None":
    """Predict, in chunks where a file is wanted, and join what was predicted to its spots."""
    ids = list(predictor.reader.ids)
    if target is None:
        return to_adata(predictor, genes, make(slice(None)))

    def finish(table: pd.DataFrame) -> None:
        check_ids(table["id"].tolist(), ids)
        publish(target, to_adata(predictor, genes, table).write_h5ad)
        write_skipped(target, skipped)

    table = in_chunks(len(ids), make, out=target, request=request, finish=finish, unit="spots")
    return None if table is None else to_adata(predictor, genes, table)


def all_answers(
    predictor: SpotPredictor,
    genes: Sequence[str],
    rows: slice = slice(None),
    *,
    samples: bool = False,
) -> pd.DataFrame:
    """Predict some rows: a table with ``id`` and a column for each answer and gene.

    Of a system that samples, also a column for each part of their spread and gene, ``n_samples``,
    and, where they are asked for, the samples of each row in one cell, sample by sample.
    """
    where = np.arange(len(predictor.reader.ids))[rows]
    columns = pd.Index(predictor.genes).get_indexer(genes)
    values, drawn = predictor.ask(where)
    if drawn is not None:
        values |= {f"{PREDICTED}_{name}": part for name, part in summarise(drawn).items()}
    tables = [pd.DataFrame({"id": [predictor.reader.ids[row] for row in where]})]
    for name, part in values.items():
        wanted = _columns(part, len(predictor.genes), columns)
        tables.append(pd.DataFrame(wanted, columns=[f"{name}\t{gene}" for gene in genes]))
    if drawn is not None:
        tables[0][_COUNT] = drawn.shape[1]
        if samples:
            wanted = _columns(drawn, len(predictor.genes), columns)
            tables[0][SAMPLES] = list(wanted.reshape(len(wanted), -1))
    return pd.concat(tables, axis=1)


def _columns(values: np.ndarray, width: int, columns: np.ndarray) -> np.ndarray:
    """Choose genes of values [..., G]; only the first answer is given for untrained ones."""
    blank = np.full((*values.shape[:-1], width - values.shape[-1]), np.nan, np.float32)
    return np.concatenate([values, blank], axis=-1)[..., columns]


def to_adata(predictor: SpotPredictor, genes: list[str], table: pd.DataFrame) -> "AnnData":
    """Join what :func:`all_answers` gives to the spots."""
    from anndata import AnnData

    slides = predictor.slides
    obs = pd.concat([slide.adata.obs[_OBS] for slide in slides])
    if len(slides) > 1:  # the same array position is on every slide
        obs.index = pd.Index(predictor.reader.ids)
    layers: dict[str, np.ndarray] = {}
    answers = [column for column in table.columns if "\t" in column]
    for name in dict.fromkeys(column.partition("\t")[0] for column in answers):
        wanted = [f"{name}\t{gene}" for gene in genes]
        layers[name] = table[wanted].to_numpy(np.float32)
    config = predictor.model.config
    adata = AnnData(layers[PREDICTED], obs=obs, var=pd.DataFrame(index=pd.Index(genes)))
    if predictor.new is not None:
        adata.var["trained"] = adata.var_names.isin(config.targets)
    adata.layers.update(layers)
    adata.obsm["spatial"] = np.concatenate([slide.xy for slide in slides])
    adata.uns["spatial"] = {s.name: s.adata.uns["spatial"][s.name] for s in slides}
    adata.uns["seq2expr"] = {
        "label": config.label,
        "panel": config.panel["name"],
        "system": config.model_type,
        "encoder": config.encoder["kind"],
        "patch_um": config.patch_um,
        "patch_px": config.patch_px,
        "mpp": {slide.name: slide.mpp for slide in slides},
    }
    if _COUNT in table:
        adata.uns["seq2expr"]["samples"] = int(table[_COUNT].iloc[0])
    if SAMPLES in table:
        adata.obsm[SAMPLES] = np.stack(list(table[SAMPLES])).reshape(len(adata), -1, len(genes))
    # Pictures in which boundaries were looked for and nuclei cannot be seen.
    if coarse := [name for name, source in predictor.reader.inputs.items() if source.coarse]:
        adata.uns["seq2expr"]["coarse"] = coarse
    return adata


def _identity(run: Path, slides: Sequence[SpotSlide], genes: Sequence[str]) -> str:
    """Identify the request by content, so that only the same one is resumed."""
    model = [path for name in ("*.json", "*.safetensors") for path in run.rglob(name)]
    parts = [file_digest(path) for path in sorted(model) if "checkpoints" not in path.parts]
    for slide in slides:
        spots: Mapping = {"names": list(slide.adata.obs_names), "xy": slide.xy.tolist()}
        parts += [slide.name, file_digest(slide.image), str(slide.mpp), str(spots)]
    return digest("|".join([*parts, *genes]))
