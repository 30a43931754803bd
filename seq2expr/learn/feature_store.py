"""Features of a frozen image encoder on disk, computed once for the patches of a slide.

A store holds the patches as they lie, or in all eight turns of the square (an encoder of others
is not blind to how a patch lies, so turned patches are what an augmentation of its features is).
Where turning a patch only moves the tokens of an encoder, as they lie is enough, and they are
moved when they are read. A store is keyed by the patches and the identity of the encoder; an
interrupted build leaves nothing.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.image.patches import TURNS, dihedral
from seq2expr.image.tiles import tile_order
from seq2expr.learn.trunk_cache import HALF_MAX, on_gpu
from seq2expr.model.encoders import PatchEncoder, TokenLayout
from seq2expr.progress import progress
from seq2expr.store import Store, cache_dir, open_store

log = logging.getLogger(__name__)

HALF_FROM = 8192
"""Numbers P × D per patch from which they are kept as float16 (where all of them fit)."""

TOLERANCE = 2.0**-8
"""Largest difference of a patch computed again alone, as a share of the root mean square."""

_FORMAT = 1  # of the arrays; part of every key


class Patches(Protocol):
    """The patches of a slide (:class:`seq2expr.image.patches.PatchStore`)."""

    key: str
    patches: np.ndarray


class FeatureStore:
    """Features of the patches of one slide, in their order.

    Parameters
    ----------
    store
        A finished store; use :func:`open_features`.
    equivariant
        Turning a patch only moves its tokens, so that the store has every turn.

    Attributes
    ----------
    key
        Hash of patches, encoder and turns.
    layout
        P and D.
    turns
        Number of turns T on disk: 1 or 8.
    """

    def __init__(self, store: Store, *, equivariant: bool = False):
        self.key = store.path.name
        self._equivariant = equivariant
        self._features = store.array("features")
        self.turns, _, *layout = self._features.shape
        self.layout = TokenLayout(*layout)

    def __len__(self) -> int:
        return self._features.shape[1]

    def read(self, rows: np.ndarray, turns: np.ndarray | None = None) -> np.ndarray:
        """Read features into memory.

        Parameters
        ----------
        rows
            int [B].
        turns
            int [B], the turn of each (see :func:`seq2expr.image.patches.dihedral`); as they lie
            by default.

        Returns
        -------
        numpy.ndarray
            float32 [B, P, D].
        """
        if turns is None:
            return self._features[0][rows].astype(np.float32)
        if self._equivariant:
            order = tile_order(math.isqrt(self.layout.tokens), turns)
            return np.take_along_axis(self.read(rows), order[..., None], axis=1)
        if np.max(turns, initial=0) >= self.turns:
            raise ValueError(f"turn {np.max(turns)}: the store has {self.turns}; open it with 8")
        return self._features[turns, rows].astype(np.float32)


def open_features(
    encoder: PatchEncoder, patches: Patches, *, turns: int = 1, batch_size: int = 64
) -> FeatureStore:
    """Open the features of patches, computing them first where they are not on disk.

    They are computed in float32, on a GPU if there is one; the encoder comes back to where it
    was. The next batch is read while one is computed.

    Parameters
    ----------
    encoder
        A frozen encoder. Where the features are on disk it may lack its weights.
    patches
        The patches of a slide.
    turns
        1, or 8 for all turns of the square.
    batch_size
        Patches that the encoder is given at once.

    Raises
    ------
    UserError
        When the encoder is trained, the disk cannot hold the features, or the encoder gives what
        cannot be kept.
    """
    if turns not in (1, TURNS):
        raise ValueError(f"turns is {turns}; it can be 1 or {TURNS}")
    if not encoder.frozen:
        raise UserError(
            "Features of an encoder that is trained cannot be kept: they change with every step. "
            "Set train of the encoder to false, or turn off data.features."
        )
    turns = 1 if encoder.equivariant else turns
    settings = {"patches": patches.key, "encoder": encoder.identity, "turns": turns}
    store = open_store(
        "features",
        sources={},
        settings={"version": _FORMAT, **settings},
        build=lambda target: _build(encoder, patches, turns, batch_size, target),
    )
    return FeatureStore(store, equivariant=encoder.equivariant)


def _build(
    encoder: PatchEncoder, patches: Patches, turns: int, batch_size: int, target: Path
) -> Mapping[str, Any]:
    """Write ``features.npy``; as float32 after all where a value does not fit in float16."""
    shape = (turns, len(patches.patches), *encoder.layout)
    dtype = np.float32 if np.prod(encoder.layout) < HALF_FROM else np.float16
    _check_room(shape, dtype)
    path = target / "features.npy"
    with on_gpu(encoder):
        if not _write(path, encoder, patches, shape, dtype, batch_size):
            dtype = np.float32
            _check_room(shape, dtype)
            _write(path, encoder, patches, shape, dtype, batch_size)
    return {"shape": list(shape), "dtype": np.dtype(dtype).name}


def _write(
    path: Path,
    encoder: PatchEncoder,
    patches: Patches,
    shape: tuple[int, ...],
    dtype: type,
    batch_size: int,
) -> bool:
    """Compute and write all features; False where one does not fit in float16.

    Plain writes, not a memory map: on a full disk a write raises, a map kills the process.
    """
    device = next((p.device for p in encoder.parameters()), _usual_device())
    batches = _batches(patches.patches, shape[0], batch_size, pinned=device.type == "cuda")
    total = -(-shape[1] // batch_size) * shape[0]
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with path.open("wb") as handle, torch.inference_mode():
        np.lib.format.write_array_header_2_0(handle, header)
        for number, batch in enumerate(
            progress(batches, what="image features", total=total, unit="batch")
        ):
            values = encoder(batch.to(device, non_blocking=True)).cpu().numpy()
            if values.shape[1:] != shape[2:]:
                raise UserError(
                    f"The encoder gives features of shape {values.shape[1:]}, not {shape[2:]} "
                    "(tokens, width); its layout is wrong."
                )
            largest = float(np.abs(values).max())
            if not np.isfinite(largest):
                raise UserError(
                    "The encoder gives a value that is not finite. Check its weights, and that "
                    "mean and std of the encoder are those of its training."
                )
            if dtype is np.float16 and largest > HALF_MAX:
                return False
            if number == 0:
                _check_alone(values[-1], encoder(batch[-1:]).cpu().numpy()[0])
            handle.write(np.ascontiguousarray(values, dtype=dtype).data)
    return True


def _batches(
    patches: np.ndarray, turns: int, batch_size: int, *, pinned: bool
) -> Iterator[Tensor]:
    """Read batches turn by turn, each while the one before is computed."""

    def read(turn: int, start: int) -> Tensor:
        part = patches[start : start + batch_size]
        turned = dihedral(part, np.full(len(part), turn))
        batch = torch.from_numpy(turned)
        return batch.pin_memory() if pinned else batch

    places = [(t, start) for t in range(turns) for start in range(0, len(patches), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        waiting = reader.submit(read, *places[0])
        for place in places[1:]:
            ready, waiting = waiting, reader.submit(read, *place)
            yield ready.result()
        yield waiting.result()


def _check_alone(together: np.ndarray, alone: np.ndarray) -> None:
    """Refuse an encoder that says something else of a patch when others are beside it.

    Raises
    ------
    UserError
        Naming the difference.
    """
    off, size = (np.sqrt(np.mean(np.square(v))) for v in (together - alone, alone))
    if off > TOLERANCE * size + 1e-6:
        raise UserError(
            "The encoder gives other features for a patch alone than among others, or a second "
            f"time (they differ by {off:.3g}), so that they cannot be kept. Use another."
        )


def _check_room(shape: tuple[int, ...], dtype: type) -> None:
    """Say what is about to be computed, and refuse what the disk cannot hold."""
    place = cache_dir()
    needed = np.prod(shape, dtype=np.int64) * np.dtype(dtype).itemsize / 1e6
    free = shutil.disk_usage(place).free / 1e6
    log.info(
        "image features of %d patches, %d turns: %.1f MB in %s (%.0f MB free)",
        *(shape[1], shape[0], needed, place, free),
    )
    if needed > free:
        raise UserError(
            f"The features of {shape[1]:,} patches need {needed:,.1f} MB, and {place} has "
            f"{free:,.1f} MB free. Free some space, set SEQ2EXPR_CACHE to another disk, or pool "
            "the tokens of the encoder."
        )


def _usual_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
