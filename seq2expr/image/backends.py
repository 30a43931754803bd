"""The three libraries that read slides, behind one small interface, and what they raise."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from seq2expr.errors import UserError

BAND_PX = 1 << 22
"""Pixels that are taken of a decoded image, or shrunk, at a time."""
WHITE = 255
_OME_UM = {"µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_pillow_limit = threading.Lock()


class Source(Protocol):
    """What reads one file: level sizes and raw pixels inside the image."""

    levels: list[tuple[int, int]]
    mpp: tuple[float, float] | None
    tile: tuple[int, int] | None
    channels: int

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Give the pixels [height, width, channels] of a box inside a level, in its pixels."""

    def close(self) -> None:
        """Let go of the file."""


def installed(module: str, path: Path) -> ModuleType:
    """Import a reader of the extra."""
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(
            f"{path} needs the reader {module}, which is not installed. "
            "Install it with: pip install 'seq2expr[wsi]'."
        ) from error


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn what the readers raise about a bad file into one message."""
    try:
        yield
    except UserError:
        raise
    except _failures() as error:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as an image: {why}. It may be damaged or cut short; "
            "fetch it again, or save it as TIFF, PNG or JPEG."
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """List what the readers and their codecs raise; they share no class of errors."""
    openslide = sys.modules.get("openslide")
    own = (openslide.OpenSlideError,) if openslide else ()
    return (OSError, ValueError, RuntimeError, ArithmeticError, LookupError, SyntaxError, *own)


@contextlib.contextmanager
def unlimited_pillow() -> Iterator[None]:
    """Lift Pillow's limit on pixels while a header is read: slides are larger."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """Make RGB of 1 to 4 channels: the high byte of 16 bits, alpha over white."""
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * WHITE
    if pixels.dtype != np.uint8 or pixels.shape[2] > 4:
        raise UserError(
            f"A slide has {pixels.shape[2]} channels of type {pixels.dtype}; 1 to 4 channels of "
            "8 or 16 bits are read. Export the H&E image as RGB."
        )
    colour = pixels[..., :-1] if pixels.shape[2] in (2, 4) else pixels
    if colour is not pixels:
        alpha = pixels[..., -1:].astype(np.uint16)
        over = colour * alpha + WHITE * (WHITE - alpha) + WHITE // 2
        colour = (over // WHITE).astype(np.uint8)
    return colour if colour.shape[2] == 3 else np.repeat(colour, 3, axis=2)


class Plain:
    """An image that Pillow decodes as a whole, on the first read; kept until closed."""

    tile = None

    def __init__(self, path: Path):
        self._path, self._lock, self._pixels = path, threading.Lock(), None
        with unlimited_pillow(), Image.open(path) as image:
            self.levels = [image.size]
            dpi = image.info.get("dpi")
            self.channels = 3 if image.mode == "P" else len(image.getbands())
        # Pillow gives dpi only where the unit is the inch, the centimetre or the metre.
        self.mpp = (25400 / float(dpi[0]), 25400 / float(dpi[1])) if dpi and all(dpi) else None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Give the pixels of a box; see :class:`Source`."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decoded()
            return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        """Forget the decoded pixels."""
        with self._lock:
            self._pixels = None

    def _decoded(self) -> np.ndarray:
        """Decode to RGB; in bands, because Pillow copies what it hands out twice."""
        with unlimited_pillow():
            image = Image.open(self._path)
        with image:
            image.load()
        if image.mode == "P":
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        width, height = image.size
        out = np.empty((height, width, 3), np.uint8)
        rows = max(BAND_PX // width, 1)
        for top in range(0, height, rows):
            band = np.asarray(image.crop((0, top, width, min(top + rows, height))))
            out[top : top + rows] = to_rgb(band if band.ndim == 3 else band[..., None])
        return out


class _Handles:
    """One open file per thread and process: positions in a file are shared over a fork."""

    def __init__(self, path: Path):
        self.path = path
        self._open: list[Any] = []
        self._local = threading.local()

    def handle(self) -> Any:
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.handle, self._local.pid = self._opened(), os.getpid()
            self._open.append(self._local.handle)
        return self._local.handle

    def _opened(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        while self._open:
            self._open.pop().close()
        self._local = threading.local()

    __del__ = close


class Scanner(_Handles):
    """A whole-slide file read by OpenSlide."""

    channels = 4

    def __init__(self, path: Path):
        super().__init__(path)
        slide = self.handle()
        self.levels = list(slide.level_dimensions)
        self.mpp = _mpp_of(slide.properties, "openslide")
        sides = [slide.properties.get(f"openslide.level[0].tile-{s}") for s in ("width", "height")]
        self.tile = (int(sides[0]), int(sides[1])) if all(sides) else self.levels[0]

    def _opened(self) -> Any:
        return installed("openslide", self.path).OpenSlide(str(self.path))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Give the pixels of a box; see :class:`Source`."""
        slide = self.handle()
        down = slide.level_downsamples[level]
        place = (round(x * down), round(y * down))
        return np.asarray(slide.read_region(place, level, (width, height)))


class Tiff(_Handles):
    """A TIFF or OME-TIFF read by tiffslide."""

    def __init__(self, path: Path):
        super().__init__(path)
        slide = self.handle()
        file = slide.ts_tifffile
        series = file.series[slide.properties["tiffslide.series-index"]]
        self._check_complete(series)
        self.levels = [(int(w), int(h)) for w, h in slide.level_dimensions]
        page, axes = series[0], slide.properties["tiffslide.series-axes"]
        strip = (page.imagewidth, min(page.rowsperstrip or page.imagelength, page.imagelength))
        self.tile = (page.tilewidth, page.tilelength) if page.is_tiled else strip
        self.channels = 1 if axes == "YX" else series.shape[0 if axes == "CYX" else 2]
        ome = _ome_mpp(file.ome_metadata) if file.is_ome else None
        self.mpp = ome or _mpp_of(slide.properties, "tiffslide")

    def _opened(self) -> Any:
        return installed("tiffslide", self.path).TiffSlide(str(self.path))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Give the pixels of a box; see :class:`Source`."""
        slide = self.handle()
        # tiffslide takes level-0 positions and rounds down on the way back.
        down = slide.level_downsamples[level]
        place = (int(np.ceil(x * down)), int(np.ceil(y * down)))
        return slide.read_region(place, level, (width, height), as_array=True)

    def _check_complete(self, series: Any) -> None:
        """Refuse a file that ends before its last tile: parts would read as black."""
        size = self.path.stat().st_size
        for level in series.levels:
            ends = np.add(level[0].dataoffsets, level[0].databytecounts)
            if ends.max(initial=0) > size:
                raise UserError(
                    f"{self.path} is cut short: its pixels end at byte {ends.max():,}, the file "
                    f"at {size:,}. Fetch it again."
                )


def _mpp_of(properties: Mapping[str, Any], prefix: str) -> tuple[float, float] | None:
    """Read um per pixel of the properties that both whole-slide readers give."""
    found = [properties.get(f"{prefix}.mpp-{axis}") for axis in "xy"]
    return (float(found[0]), float(found[1])) if all(found) else None


def _ome_mpp(text: str) -> tuple[float, float] | None:
    """Read PhysicalSizeX and Y of the first image of OME-XML; the unit defaults to um."""
    pixels = ElementTree.fromstring(text).find("{*}Image/{*}Pixels")
    sizes = []
    for axis in "XY":
        value = None if pixels is None else pixels.get(f"PhysicalSize{axis}")
        unit = _OME_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm")) if value else None
        if value is None or unit is None:
            return None
        sizes.append(float(value) * unit)
    return sizes[0], sizes[1]


SOURCES = {"openslide": Scanner, "tiffslide": Tiff, "pillow": Plain}
