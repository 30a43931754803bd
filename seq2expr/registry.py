"""What can be named in a configuration: systems and backbones, with paper and licence."""

from typing import NamedTuple


class SystemEntry(NamedTuple):
    """One row of ``seq2expr list systems``."""

    name: str
    reads: str
    paper: str
    code_licence: str


class BackboneEntry(NamedTuple):
    """One row of ``seq2expr list backbones``."""

    name: str
    what: str


SYSTEMS = (
    SystemEntry(
        "seq2exp",
        "DNA window, epigenomic tracks, gene features",
        "Su et al. 2025, Learning to Discover Regulatory Elements for Gene Expression Prediction",
        "ours (MIT); the authors' code is GPL-3 and not used",
    ),
)
"""Systems that train, predict and evaluate in this version."""

BACKBONES = (
    BackboneEntry("conv", "strided convolution tower; fast on a CPU"),
    BackboneEntry("bimamba", "bidirectional Mamba at base resolution (the published backbone)"),
)
"""Interchangeable DNA backbones (``model.backbone``)."""

LISTS = {"systems": SYSTEMS, "backbones": BACKBONES}
"""What ``seq2expr list`` shows."""
