"""What a configuration holds of the data: scalers and lists, fitted on training spots alone."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from seq2expr.image.boundary_store import fit_boundary
from seq2expr.learn.joint_bank import facts
from seq2expr.model.spot_system import SpotConfig
from seq2expr.spots.reading import SpotReader

if TYPE_CHECKING:
    from seq2expr.spots.train import SpotMaterial


def fit_scalers(material: "SpotMaterial", geometry: SpotConfig) -> dict[str, Any]:
    """Return the fitted fields that a configuration of this geometry has."""
    reader, data = material.reader, material.data
    rows = data.rows("train")
    fitted = fit_targets(material, geometry)
    if reader.expression is not None:
        mean, sd = scaling(reader.expression[rows])
        fitted |= {"expression_mean": mean.tolist(), "expression_sd": sd.tolist()}
    inputs = list(reader.inputs.values())
    if geometry.sight.standardised and all(s.features is not None for s in inputs):
        fitted |= _named("token", _moments(_tokens(reader, rows)))
    if inputs[0].windows is not None or inputs[0].whole is not None:
        fitted |= _named("context", _moments(_context_tokens(reader, rows)))
    if inputs[0].boundary is not None:
        spots = data.table.iloc[rows].groupby("slide", sort=False)["row"]
        stores = [reader.inputs[name].boundary for name, _ in spots]
        fitted["boundary_scale"] = fit_boundary(stores, [own.to_numpy() for _, own in spots])
    return _known(fitted, geometry)


def fit_targets(material: "SpotMaterial", geometry: SpotConfig) -> dict[str, Any]:
    """Return what a configuration holds of the genes, fitted on the training spots."""
    mean, sd = material.scaling
    fitted = {
        "targets": list(material.panel.genes),
        "target_mean": mean.tolist(),
        "target_sd": sd.tolist(),
        "label": material.data.card.name,
        "panel": material.panel.to_dict(),
    }
    if material.others is not None:
        mean, sd = scaling(material.reader.auxiliary[material.data.rows("train")])
        fitted["auxiliary"] = list(material.others.genes)
        fitted |= _named("auxiliary", (mean, sd))
    if material.bank is not None:
        fitted["gene_vectors"] = material.bank.vectors.tolist()
        fitted["gene_bank"] = facts(material.bank)
    return _known(fitted, geometry)


def scaling(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each column; 0 and 1 where nothing is known."""
    known = ~np.isnan(values)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0, dtype=np.float64) / n
    sd = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / n)
    return mean, np.where(sd > 0, sd, 1.0)


def _known(fitted: dict[str, Any], geometry: SpotConfig) -> dict[str, Any]:
    """Keep the fields that the configuration has, or that of what it wraps."""
    held = {*geometry.fitted, *geometry.sight.fitted}
    return {name: value for name, value in fitted.items() if name in held}


def _named(name: str, moments: tuple[np.ndarray, np.ndarray]) -> dict[str, list[float]]:
    mean, sd = moments
    return {f"{name}_mean": mean.tolist(), f"{name}_sd": sd.tolist()}


def _tokens(reader: SpotReader, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the tokens [n, P, D] of spots."""
    for source, own in reader.by_slide(rows):
        yield source.features.read(own)


def _context_tokens(reader: SpotReader, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the tokens [n, D] of windows inside the picture, or else of the spots themselves."""
    for source, own in reader.by_slide(rows):
        if source.windows is None:
            yield source.tokens[own]
        else:
            tokens, valid = source.windows.read(own, None)
            yield tokens[valid]


def _moments(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each feature over all tokens [..., D]."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        tokens = part.reshape(-1, part.shape[-1]).astype(np.float64)
        count, total = count + len(tokens), total + tokens.sum(0)
        squares = squares + (tokens**2).sum(0)
    mean = total / count
    sd = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    # A feature that never changes is left at 0 by its mean; rounding must not blow it up.
    return mean, np.where(sd > 1e-6 * np.maximum(np.abs(mean), 1e-6), sd, 1.0)
