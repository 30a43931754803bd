"""Features of a frozen trunk on disk, computed once per window.

``<cache>/trunk/<identity>/`` holds shards: ``NAME.npy`` with rows [n, N, C], and ``NAME.json``
with the key of each row and the hash of the array. The key of a row hashes what the trunk reads
of it, so a window is found again wherever it comes from, and nothing but hashes of the sequence
is kept. A shard is published whole, the array before the file that names it: what an interrupted
run leaves is complete, and the next run goes on from there.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from seq2expr.errors import Seq2ExprWarning, UserError
from seq2expr.model.batch import Batch
from seq2expr.model.trunks import Trunk
from seq2expr.progress import progress
from seq2expr.store import cache_dir, file_digest, publish, release, write_text

log = logging.getLogger(__name__)

SHARD_ROWS = 256
"""Most rows of a shard."""

SHARD_BYTES = 1 << 27
"""Most bytes of a shard whose rows are large; this much is held in memory while it is made."""

MAPPED_BYTES = 1 << 30
"""Bytes read after which the memory of the maps is let go."""

HALF_MAX = 65504.0
"""Largest float16."""

TOLERANCE = 2.0**-9
"""Largest difference of a bin computed again, as a share of the bin's root mean square plus that
of the row (float16 rounds by 2^-11, and so does the TF32 of a GPU)."""

_CHECKED = 100  # one row of so many is computed a second time


class Place(NamedTuple):
    """Where a row lies."""

    shard: str
    row: int


class _Row(NamedTuple):
    """A row that was computed, and the window it is of, while that is needed."""

    key: str
    values: np.ndarray
    window: Batch | None


class TrunkCache:
    """The features of a trunk, looked up by window or computed.

    Several processes may use one cache: files are never changed, and only :meth:`prepare` takes
    turns, so that no window is computed twice.

    Parameters
    ----------
    trunk
        A trunk with its weights; one that is no longer asked to compute may lack them.
    batch_size
        Windows that the trunk is given at once.
    verify
        Hash shards again even where path, size and time are known.

    Raises
    ------
    UserError
        When the folder holds the features of another trunk, or cannot be written.
    """

    def __init__(self, trunk: Trunk, *, batch_size: int = 8, verify: bool = False):
        self.trunk = trunk
        self.batch_size = batch_size
        self.verify = verify
        self.path = cache_dir() / "trunk" / trunk.identity
        self._places: dict[str, Place] = {}
        self._sums: dict[str, str] = {}
        self._shards: dict[str, np.ndarray] = {}
        self._read = 0
        self._open()
        self._scan()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk, in float16."""
        return 2 * self.trunk.layout.bins * self.trunk.layout.channels

    @property
    def shard_rows(self) -> int:
        """Rows of a full shard."""
        return max(1, min(SHARD_ROWS, SHARD_BYTES // self.row_bytes))

    def keys(self, batch: Batch) -> list[str]:
        """Hash what the trunk reads of each row of a batch (32 hex digits).

        A batch without ``keep`` has the keys of one in which all bases count.
        """
        read = {name: getattr(batch, name) for name in (*self.trunk.needs, "keep")}
        scale = b"" if "signal" not in read else _bytes(batch.signal_scale.float())
        keys = []
        for row in range(len(batch.codes)):
            state = hashlib.blake2b(scale, digest_size=16)
            for name, value in read.items():
                if value is None:
                    continue
                part = value[row if len(value) > 1 else 0]
                if name == "keep" and bool(part.all()):
                    continue
                state.update(f"|{name} {part.dtype} {tuple(part.shape)}|".encode())
                state.update(_bytes(part))
            keys.append(state.hexdigest())
        return keys

    def missing(self, batch: Batch) -> list[int]:
        """Return the rows of a batch whose features are not on disk.

        Shards that hold others are checked on the way; a damaged one counts as missing.
        """
        return [row for row, key in enumerate(self.keys(batch)) if self._find(key) is None]

    def prepare(self, batches: Iterable[Batch], n_windows: int, what: str) -> None:
        """Compute the features of all windows that are not there yet, on a GPU if there is one.

        Processes that are started together may all call this: one computes while the others wait.

        Parameters
        ----------
        batches
            The windows; they are gone through twice, once to count.
        n_windows
            How many windows there are.
        what
            What they are, for the log and the bar (``"training windows"``).

        Raises
        ------
        UserError
            When the disk cannot hold them, or the trunk gives what cannot be kept.
        """
        if isinstance(batches, Iterator):
            raise TypeError("batches are gone through twice; give a list or a loader.")
        with filelock.FileLock(self.path / ".lock"):
            self._scan()
            counting = progress(batches, what=f"looking for {what}")
            wanted = {key for batch in counting for key in self.keys(batch)}
            todo = {key for key in wanted if self._find(key) is None}
            if not todo:
                return
            self._announce(len(todo), n_windows, what)
            with on_gpu(self.trunk), self.trunk.session() as compute:
                rows = self._computed(batches, todo, compute)
                bar = progress(rows, what=what, total=len(todo), unit="window")
                self._keep(bar, check=compute)

    def features(self, batch: Batch) -> Tensor:
        """Return the features of a batch, float32 [B, N, C] on the CPU.

        Rows that are not there are computed and added.

        Raises
        ------
        UserError
            When rows are missing and the trunk cannot be called here.
        """
        keys = self.keys(batch)
        todo = {key for key in keys if self._find(key) is None}
        if todo:
            if not self.trunk.online:
                raise UserError(
                    f"{len(todo)} windows have no features of the trunk, which runs in a process "
                    "of its own. Compute them first (TrunkCache.prepare)."
                )
            self._keep(self._computed([batch], todo, self.trunk))
        layout = self.trunk.layout
        out = torch.empty(len(keys), layout.bins, layout.channels)
        for row, key in enumerate(keys):
            place = self._find(key)
            out[row] = torch.from_numpy(self._shards[place.shard][place.row])
        self._read += len(keys) * self.row_bytes
        if self._read > MAPPED_BYTES:
            self._read = 0
            for shard in self._shards.values():
                release(shard)
        return out

    def check(self, batch: Batch) -> None:
        """Compute one row in a hundred again, alone, and compare it with what is on disk.

        Raises
        ------
        UserError
            When they differ by more than the rounding of float16.
        """
        with self.trunk.session() as compute:
            for index in range(0, len(batch.codes), _CHECKED):
                window = self._take(batch, [index])
                _compare(self.features(window), window, compute)

    def _computed(
        self, batches: Iterable[Batch], todo: set[str], compute: Callable[[Batch], Tensor]
    ) -> Iterator[_Row]:
        """Compute each window of ``todo`` once, in the order of the batches."""
        left = set(todo)
        shape = self.trunk.layout[:2]
        for batch in batches:
            first = {key: row for row, key in reversed(list(enumerate(self.keys(batch))))}
            rows = sorted((row, key) for key, row in first.items() if key in left)
            left.difference_update(first)
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                taken = self._take(batch, [row for row, _ in part])
                with torch.inference_mode():
                    values = compute(taken).float().cpu().numpy()
                if values.shape != (len(part), *shape):
                    raise UserError(
                        f"The trunk gives features of shape {values.shape[1:]}, not {shape} "
                        "(bins, channels). Correct its layout."
                    )
                for index, (_, key) in enumerate(part):
                    yield _Row(key, _rounded(values[index]), self._take(taken, [index]))

    def _keep(
        self, rows: Iterable[_Row], *, check: Callable[[Batch], Tensor] | None = None
    ) -> None:
        """Write rows as shards; with ``check``, first compute some of them a second time."""
        shard: list[_Row] = []
        for row in rows:
            if check is not None and len(shard) % _CHECKED == 0:
                _compare(torch.from_numpy(row.values[None]), row.window, check)
            shard.append(row._replace(window=None))
            if len(shard) == self.shard_rows:
                self._write(shard)
                shard, check = [], None
        if shard:
            self._write(shard)

    def _write(self, rows: list[_Row]) -> None:
        """Publish a shard."""
        array = self.path / f"{uuid.uuid4().hex[:16]}.npy"
        values = np.stack([row.values for row in rows])  # float32 where one row is
        publish(array, lambda temporary: _save(temporary, values))
        known = {"identity": self.trunk.identity, "blake2b": file_digest(array)}
        known["keys"] = [row.key for row in rows]
        write_text(array.with_suffix(".json"), json.dumps(known))
        self._scan()

    def _take(self, batch: Batch, rows: list[int]) -> Batch:
        """Return some rows of what the trunk reads of a batch."""
        taken = {"ids": batch.ids and [batch.ids[row] for row in rows]}
        for name in (*self.trunk.needs, "keep"):
            value = getattr(batch, name)
            if value is not None:
                taken[name] = value if len(value) == 1 < len(batch.codes) else value[rows]
        return Batch(**taken, signal_scale=batch.signal_scale)

    def _announce(self, count: int, n_windows: int, what: str) -> None:
        """Say what is about to be computed, and refuse what the disk cannot hold."""
        needed = count * self.row_bytes / 1e6
        free = shutil.disk_usage(self.path).free / 1e6
        size = f"{needed:,.1f} MB in {self.path} ({free:,.0f} MB free)"
        windows = f"{count:,} of {n_windows:,} windows to compute"
        log.info("trunk features of %s: %s, %s", what, windows, size)
        if needed > free:
            raise UserError(
                f"The trunk features of {count:,} windows need {needed:,.1f} MB, and {self.path} "
                f"has {free:,.1f} MB free. Free some space, set SEQ2EXPR_CACHE to another disk, "
                "or use fewer genes."
            )

    def _open(self) -> None:
        """Claim the folder for this trunk, or refuse that of another."""
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            known = {"identity": self.trunk.identity, "layout": self.trunk.layout._asdict()}
            write_text(manifest, json.dumps(known, indent=1))
        self._check_identity(json.loads(manifest.read_text(encoding="utf-8"))["identity"])

    def _check_identity(self, found: str) -> None:
        if found != self.trunk.identity:
            raise UserError(
                f"{self.path} holds features of the trunk {found}, not of {self.trunk.identity}. "
                "Remove it, or set SEQ2EXPR_CACHE to another folder."
            )

    def _scan(self) -> None:
        """Learn of shards that were published since the last look."""
        for path in self.path.glob("*.json"):
            if path.stem in self._sums or path.stem == "manifest":
                continue
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                self._discard(path.stem)
                continue
            self._check_identity(known["identity"])
            self._sums[path.stem] = known["blake2b"]
            self._places |= {key: Place(path.stem, row) for row, key in enumerate(known["keys"])}

    def _find(self, key: str) -> Place | None:
        """Tell where a row lies; the shard is checked when it is first asked for."""
        place = self._places.get(key)
        if place is None or place.shard in self._shards:
            return place
        array = self.path / f"{place.shard}.npy"
        if array.is_file() and file_digest(array, verify=self.verify) == self._sums[place.shard]:
            # Private, not read-only, because PyTorch warns of arrays that it must not write.
            self._shards[place.shard] = np.asarray(np.load(array, mmap_mode="c"))
            return place
        self._discard(place.shard)
        return None

    def _discard(self, shard: str) -> None:
        """Remove a damaged shard; its rows are missing from then on."""
        warnings.warn(
            f"{self.path / shard}.npy is damaged: it is not what was written. It is removed, and "
            "its features are computed again when they are needed.",
            Seq2ExprWarning,
        )
        for suffix in (".json", ".npy"):
            (self.path / f"{shard}{suffix}").unlink(missing_ok=True)
        self._places = {key: p for key, p in self._places.items() if p.shard != shard}


@contextlib.contextmanager
def on_gpu(model: nn.Module) -> Iterator[None]:
    """Take a model to the GPU, where there is one, and back."""
    home = next((parameter.device for parameter in model.parameters()), None)
    away = home is not None and home.type == "cpu" and torch.cuda.is_available()
    if away:
        model.to("cuda")
    try:
        yield
    finally:
        if away:
            model.to(home)


def _rounded(values: np.ndarray) -> np.ndarray:
    """Round a row to float16 where its values fit.

    Raises
    ------
    UserError
        When a value is not finite.
    """
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise UserError(
            "The trunk gives a value that is not finite. Check its weights, and the window."
        )
    return values.astype(np.float16) if largest < HALF_MAX else values.copy()


def _compare(kept: Tensor, window: Batch, compute: Callable[[Batch], Tensor]) -> None:
    """Refuse features [1, N, C] that are others when the window is computed alone."""
    with torch.inference_mode():
        again = compute(window).float().cpu()
    off = _size(kept.float() - again)
    if bool((off > TOLERANCE * (_size(again) + again.square().mean().sqrt())).any()):
        raise UserError(
            "The trunk gives other features for a window alone than among others, or a second "
            f"time (they differ by {float(off.max()):.3g}), so that they cannot be kept. Use "
            "another trunk, and remove what is kept of this one in SEQ2EXPR_CACHE/trunk."
        )


def _size(values: Tensor) -> Tensor:
    """Root mean square of each bin: [1, N, C] to [1, N]."""
    return values.square().mean(-1).sqrt()


def _bytes(values: Tensor) -> memoryview:
    return np.ascontiguousarray(values.detach().cpu().numpy()).data


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as handle:
        np.save(handle, values)
