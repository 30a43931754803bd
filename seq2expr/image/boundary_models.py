"""Boundaries by networks that users install themselves: HED, StarDist, Cellpose, HoVer-Net.

Each replaces one part of the extractor ``od``: HED the edges, the others the nuclei. None of the
packages is a dependency. Code and weights have licences of their own (:attr:`Network.terms`), and
some weights are for non-commercial use only. A package is imported when the first block is taken.
Colours are scaled by fixed numbers: percentiles of a block would leave seams.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from seq2expr.errors import UserError
from seq2expr.image.boundary import Extractor, Seen, numbered
from seq2expr.store import file_digest

_HED_STEP = 64  # px: sides that HED takes as they are
_HOVER_IN, _HOVER_OUT = 256, 164  # px that the fast HoVer-Net reads, and answers of their middle


@dataclass(frozen=True)
class Network(Extractor):
    """What the extractors with weights share.

    Parameters
    ----------
    mpp
        µm per pixel that the network is given, where the slide is finer or coarser.
    model
        Name or path of the weights, as the package takes it.
    """

    parallel: ClassVar[bool] = False
    package: ClassVar[str]
    """Its name where packages are installed from."""
    terms: ClassVar[str]
    """What to know before: licences are to be checked by who uses them."""

    mpp: float = 0.5
    model: str = ""

    def working_mpp(self, mpp: float) -> float:
        """Return ``mpp`` of the network, whatever the slide has."""
        return self.mpp

    def fingerprint(self) -> dict[str, str]:
        """Return the release of the package, and the hash of a file of weights."""
        try:
            release = metadata.version(self.package)
        except metadata.PackageNotFoundError as error:
            raise self._missing(error) from error
        weights = Path(self.model)
        files = sorted(weights.rglob("*")) if weights.is_dir() else [weights]
        hashes = {str(i): file_digest(file) for i, file in enumerate(files) if file.is_file()}
        return {"package": f"{self.package} {release}", **hashes}

    def _import(self, module: str) -> ModuleType:
        try:
            return import_module(module)
        except ImportError as error:
            raise self._missing(error) from error

    def _missing(self, error: Exception) -> UserError:
        return UserError(
            f"The boundary extractor {self.kind} needs {self.package}, which cannot be imported "
            f"({error}). Install it with: pip install {self.package} ({self.terms}), or use od, "
            "which needs no weights."
        )


@dataclass(frozen=True)
class Hed(Network):
    """Edges by holistically-nested edge detection (Xie & Tu 2015), as controlnet-aux has it."""

    kind: ClassVar[str] = "hed"
    margin_um: ClassVar[float] = 64.0
    package: ClassVar[str] = "controlnet-aux"
    terms: ClassVar[str] = "code Apache-2.0"

    model: str = "lllyasviel/Annotators"

    @cached_property
    def _network(self) -> Any:
        return self._import("controlnet_aux").HEDdetector.from_pretrained(self.model)

    def edges(self, seen: Seen) -> np.ndarray:
        """Return the probability of an edge, [H, W]."""
        height, width = seen.region.shape[:2]
        side = -(-max(height, width) // _HED_STEP) * _HED_STEP
        square = np.pad(seen.region, ((0, side - height), (0, side - width), (0, 0)), mode="edge")
        found = self._network(
            square, detect_resolution=side, image_resolution=side, output_type="np"
        )
        return found[:height, :width, 0].astype(np.float32) / 255


@dataclass(frozen=True)
class StarDist(Network):
    """Nuclei by StarDist (Schmidt et al. 2018); ``2D_versatile_he`` is its model of H&E."""

    kind: ClassVar[str] = "stardist"
    package: ClassVar[str] = "stardist"
    terms: ClassVar[str] = "and tensorflow; code BSD-3"

    model: str = "2D_versatile_he"

    @cached_property
    def _network(self) -> Any:
        models = self._import("stardist.models")
        path = Path(self.model)
        if path.is_dir():
            return models.StarDist2D(None, name=path.name, basedir=str(path.parent))
        return models.StarDist2D.from_pretrained(self.model)

    def nuclei(self, seen: Seen) -> np.ndarray:
        """Return the number of the nucleus of each pixel."""
        labels, _ = self._network.predict_instances(seen.region / np.float32(255), axes="YXC")
        return numbered(labels, self.least_um2 / seen.mpp**2)


@dataclass(frozen=True)
class Cellpose(Network):
    """Nuclei by Cellpose from release 4 on (Pachitariu et al. 2025).

    Parameters
    ----------
    gpu
        Use one.
    """

    kind: ClassVar[str] = "cellpose"
    package: ClassVar[str] = "cellpose"
    terms: ClassVar[str] = "code BSD-3; weights come of data for non-commercial use"

    model: str = "cpsam"
    gpu: bool = False

    @cached_property
    def _network(self) -> Any:
        models = self._import("cellpose.models")
        return models.CellposeModel(gpu=self.gpu, pretrained_model=self.model)

    def nuclei(self, seen: Seen) -> np.ndarray:
        """Return the number of the nucleus of each pixel."""
        pixels = seen.region / np.float32(255)
        labels = self._network.eval(pixels, channel_axis=-1, normalize=False)[0]
        return numbered(labels, self.least_um2 / seen.mpp**2)


@dataclass(frozen=True)
class HoverNet(Network):
    """Nuclei by HoVer-Net (Graham et al. 2019) in its fast form, as tiatoolbox has it.

    Its own step that parts nuclei scales the offsets by the extremes of a region, so that nuclei
    that touch may be parted differently on both sides of a seam.
    """

    kind: ClassVar[str] = "hovernet"
    package: ClassVar[str] = "tiatoolbox"
    terms: ClassVar[str] = "code BSD-3; weights may be for non-commercial use only"

    mpp: float = 0.25
    model: str = "hovernet_fast-pannuke"

    @cached_property
    def _network(self) -> Any:
        architecture = self._import("tiatoolbox.models.architecture")
        network, _ = architecture.get_pretrained_model(self.model)
        return network.eval()

    def nuclei(self, seen: Seen) -> np.ndarray:
        """Return the number of the nucleus of each pixel."""
        height, width = seen.region.shape[:2]
        inside = np.zeros((height, width, 1), np.float32)
        offset = np.zeros((height, width, 2), np.float32)
        for place, tile in _tiles(seen.region):
            found = self._ask(tile)
            part = inside[place].shape[:2]
            inside[place], offset[place] = (
                values[: part[0], : part[1]] for values in np.split(found, [1], axis=-1)
            )
        labels = self._network._proc_np_hv(inside, offset)
        return numbered(labels, self.least_um2 / seen.mpp**2)

    def _ask(self, tile: np.ndarray) -> np.ndarray:
        """Return the probability of a nucleus and the offsets to its middle, [h, w, 3]."""
        import torch

        device = next(self._network.parameters()).device
        pixels = torch.from_numpy(np.ascontiguousarray(tile)).to(device).float()
        with torch.inference_mode():
            heads = self._network(pixels.permute(2, 0, 1).unsqueeze(0))
        found = torch.cat([heads["np"].softmax(1)[:, 1:], heads["hv"]], dim=1)
        return found[0].permute(1, 2, 0).cpu().numpy()


def _tiles(region: np.ndarray) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Yield tiles that HoVer-Net reads, and the places that it answers for."""
    height, width = region.shape[:2]
    rim = (_HOVER_IN - _HOVER_OUT) // 2
    padded = np.pad(region, ((rim, _HOVER_IN), (rim, _HOVER_IN), (0, 0)), mode="reflect")
    for top in range(0, height, _HOVER_OUT):
        for left in range(0, width, _HOVER_OUT):
            place = slice(top, top + _HOVER_OUT), slice(left, left + _HOVER_OUT)
            yield place, padded[top : top + _HOVER_IN, left : left + _HOVER_IN]
