"""Predict the expression of every spot of a slide: a picture and positions in, an AnnData out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch

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


class SpotPredictions(NamedTuple):
    """What a prediction of spots returns.

    Attributes
    ----------
    adata
        Spots × genes with ``layers["predicted"]`` = ``X``, in the units of the label card
        (``uns["seq2expr"]["label"]``). ``None`` when another process wrote it.
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
            yield Prediction(mean=mean.cpu(), other=other or None)

    def predict(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return every answer for some rows, float32 [rows, G], ``predicted`` first."""
        parts: dict[str, list[np.ndarray]] = {}
        for answer in self.answers(rows):
            parts.setdefault(PREDICTED, []).append(answer.mean.numpy())
            for name, value in (answer.other or {}).items():
                parts.setdefault(f"{PREDICTED}_{name}", []).append(value.numpy())
        return {name: np.concatenate(values) for name, values in parts.items()}


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
    predictor = open_predictor(request.model, request.slides, new=request.new, verify=verify)
    genes = [*request.genes, *(request.new.genes if request.new else ())]
    made_by = find_run(run if adapter is None else adapter)
    asked = genes if request.new is None else [*genes, request.new.hash]
    identity = _identity(made_by, request.slides, asked)
    adata = _predicted(predictor, genes, target, identity, request.skipped)
    return SpotPredictions(adata, len(predictor.reader.ids), request.skipped)


def _predicted(
    predictor: SpotPredictor,
    genes: list[str],
    target: Path | None,
    request: str,
    skipped: pd.DataFrame,
) -> "AnnData | None":
    """Predict, in chunks where a file is wanted, and join what was predicted to its spots."""
    ids = list(predictor.reader.ids)
    if target is None:
        return to_adata(predictor, genes, all_answers(predictor, genes))

    def finish(table: pd.DataFrame) -> None:
        check_ids(table["id"].tolist(), ids)
        publish(target, to_adata(predictor, genes, table).write_h5ad)
        write_skipped(target, skipped)

    make = partial(all_answers, predictor, genes)
    table = in_chunks(len(ids), make, out=target, request=request, finish=finish, unit="spots")
    return None if table is None else to_adata(predictor, genes, table)


def all_answers(
    predictor: SpotPredictor, genes: Sequence[str], rows: slice = slice(None)
) -> pd.DataFrame:
    """Predict some rows: a table with ``id`` and a column for each answer and gene."""
    where = np.arange(len(predictor.reader.ids))[rows]
    columns = pd.Index(predictor.genes).get_indexer(genes)
    tables = []
    for name, values in predictor.predict(where).items():
        # Only the first answer is given for genes that were not trained.
        blank = np.full((len(values), len(predictor.genes) - values.shape[1]), np.nan, np.float32)
        values = np.concatenate([values, blank], axis=1)[:, columns]
        tables.append(pd.DataFrame(values, columns=[f"{name}\t{gene}" for gene in genes]))
    ids = pd.Series([predictor.reader.ids[row] for row in where], name="id")
    return pd.concat([ids, *tables], axis=1)


def to_adata(predictor: SpotPredictor, genes: list[str], table: pd.DataFrame) -> "AnnData":
    """Join what :func:`all_answers` gives to the spots."""
    from anndata import AnnData

    slides = predictor.slides
    obs = pd.concat([slide.adata.obs[_OBS] for slide in slides])
    if len(slides) > 1:  # the same array position is on every slide
        obs.index = pd.Index(predictor.reader.ids)
    layers: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(column.partition("\t")[0] for column in table.columns[1:]):
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
