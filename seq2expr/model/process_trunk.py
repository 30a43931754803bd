"""A trunk in an environment of its own, such as Borzoi, whose packages conflict with ours.

It runs while features are computed (:mod:`seq2expr.learn.trunk_cache`), and never in a model.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from seq2expr.errors import UserError
from seq2expr.model import trunk_worker
from seq2expr.model.batch import Batch
from seq2expr.model.trunks import Trunk, sequence_window, settings_of_trunk
from seq2expr.store import file_digest

_LINES = 5  # of what a failed process said


class ProcessTrunk(Trunk):
    """Features from a script of the user under another interpreter.

    The script defines ``load(settings)``, which returns a function from codes (uint8 [B, L], A0
    C1 G2 T3 N4, transcribed orientation) to features [B, N, C]. Rows must not depend on one
    another.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.trunks.resolve_trunk` says of a setting with

        ``python``
            Interpreter of the other environment, which needs numpy.
        ``script``
            The script; its content is part of the identity of the trunk.
        ``settings``
            Given to ``load``. Files named there are part of the identity too.
        ``window``
            ``width`` in bp, and ``tss_index`` (by default the middle).
        ``layout``
            ``bins channels bin_bp``, and ``first_bin``, the start of the first bin relative to
            the TSS in bp; by default the bins lie in the middle of the window.
    """

    online: ClassVar[bool] = False

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check the settings, and hash the script and the files it is given."""
        required = ("python", "script", "window", "layout")
        given = settings_of_trunk(setting, required=required, optional={"settings": {}})
        window = sequence_window(given["window"])
        layout = _layout(given["layout"], window)
        script = Path(given["script"]).resolve()
        values = given["settings"] or {}
        return {
            "python": str(given["python"]),
            "script": str(script),
            "settings": values,
            "layout": layout,
            "window": window,
            "fingerprint": _fingerprint(script, values),
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "ProcessTrunk":
        """Know the layout; the process starts with a session."""
        return cls(resolved)

    @contextlib.contextmanager
    def session(self) -> Iterator[Callable[[Batch], Tensor]]:
        """Start the process, and give what sends it windows.

        Raises
        ------
        UserError
            When the script was changed, or the process cannot start or fails.
        """
        script, settings = Path(self.resolved["script"]), self.resolved["settings"]
        if _fingerprint(script, settings) != self.resolved["fingerprint"]:
            raise UserError(
                f"{script}, or a file named in its settings, is not what the trunk was resolved "
                "from. Put it back, or name it again in model.trunk and train."
            )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "settings.json").write_text(json.dumps(settings))
            with _Worker(self.resolved["python"], script, Path(folder)) as worker:
                yield lambda batch: worker.ask(batch.codes)

    def features(self, batch: Batch) -> Tensor:
        """Refuse: the trunk is in another process."""
        raise UserError(
            "The features of this trunk come from the cache, which its own process fills "
            "(TrunkCache.prepare); it cannot be run or differentiated here."
        )


class _Worker:
    """The process, from its start to its end."""

    def __init__(self, python: str, script: Path, folder: Path):
        self.folder = folder
        command = [python, trunk_worker.__file__, str(folder), str(script)]
        self.errors = (folder / "errors").open("wb")
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        except OSError as error:
            self.errors.close()
            raise UserError(
                f"The interpreter {python} cannot be started: {error.strerror}. Correct "
                "model.trunk.python."
            ) from error

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def ask(self, codes: Tensor) -> Tensor:
        """Send codes [B, L] and wait for the features [B, N, C]."""
        np.save(self.folder / "request.npy", codes.cpu().numpy())
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise UserError(self._reason())
        return torch.from_numpy(np.load(self.folder / "answer.npy"))

    def _reason(self) -> str:
        code = self.process.wait()
        said = (self.folder / "errors").read_text(errors="replace").strip().splitlines()
        return (
            f"The process of the trunk ended with exit code {code}. It said: "
            f"{' | '.join(said[-_LINES:]) or 'nothing'}."
        )


def _fingerprint(script: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hash the script and the files among its settings."""
    files = {
        key: file_digest(value)
        for key, value in settings.items()
        if isinstance(value, str) and Path(value).is_file()
    }
    others = {key: value for key, value in settings.items() if key not in files}
    return {"script": file_digest(script), "files": files, "settings": others}


def _layout(layout: Mapping[str, Any], window: Mapping[str, Any]) -> dict[str, int]:
    known = ("bins", "channels", "bin_bp")
    numbers = [layout.get(name) for name in known]
    if layout.keys() - {*known, "first_bin"} or not all(
        isinstance(number, int) and number > 0 for number in numbers
    ):
        raise UserError(
            f"trunk.layout is {dict(layout)}; give bins, channels and bin_bp, and first_bin where "
            "the bins are not in the middle of the window."
        )
    (bins, _, bin_bp), width = numbers, window["width"]
    anchor = width // 2 if window["tss_index"] is None else window["tss_index"]
    first = layout.get("first_bin", (width - bins * bin_bp) // 2 - anchor)
    before = anchor + first
    if before < 0 or before + bins * bin_bp > width or width % bin_bp or before % bin_bp:
        raise UserError(
            f"{bins:,} bins of {bin_bp} bp that begin {before:,} bp into a window of {width:,} bp "
            "do not lie on bins of the window; correct trunk.layout (first_bin is relative to the "
            "TSS) or trunk.window."
        )
    return {**dict(zip(known, numbers, strict=True)), "first_bin": first}


TRUNK = ProcessTrunk
