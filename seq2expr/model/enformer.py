"""Enformer as the trunk, through the package ``enformer-pytorch``.

Avsec et al. 2021, *Effective gene expression prediction from sequence by integrating long-range
interactions* (Nature Methods). The package gives the layers; weights and sequence encoding are
handled here, because its ``from_pretrained`` fails under transformers 5 and its string encoders
under numpy 2.3. Needs the extra ``[enformer]``.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.hub import read_weights, weights_file
from seq2expr.model.layers import one_hot
from seq2expr.model.trunks import SEQUENCE_WINDOW, Trunk, settings_of_trunk
from seq2expr.store import file_digest

BIN_BP = 128
GAMMA_POSITIONS = 1536
"""The only number of positions that the gamma basis of the published weights is known for."""

PUBLISHED = {"dim": 1536, "depth": 11, "heads": 8, "attn_dim_key": 64, "dim_divisible_by": 128}
"""Size of the published model; others are for models of one's own."""

_PARTS = {"stem": 1, "conv_tower": 2, "transformer": 4, "final_pointwise": 6}
"""Names of the trunk's parts, and their places in ``_trunk``: a checkpoint has both, or one."""

_OPTIONS = {
    "width": BIN_BP * GAMMA_POSITIONS,
    "target_length": None,
    "gamma": None,
    "pointwise": True,
    "model": None,
}


class EnformerTrunk(Trunk):
    """Bins of 128 bp after Enformer's attention layers; the heads are not kept.

    Batch norms are in evaluation mode and never updated. N is all zero and what lies past a
    chromosome end is 0.25 for each base, as the model was trained. The TSS is the first base of
    its bin: bin 448 of 896 at the published width.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.trunks.resolve_trunk` says of a setting with

        ``weights``
            File (``pytorch_model.bin`` or safetensors), or the directory that holds it.
        ``width``
            Window in bp, by default 196,608.
        ``target_length``
            Bins that are kept in the middle; by default 896, or all where there are fewer.
        ``gamma``
            Use the gamma basis of the TensorFlow model, which the published weights need and
            which exists for 196,608 bp only; by default there and nowhere else.
        ``pointwise``
            Features after the last pointwise layer (3,072 channels); False: the 1,536 before it.
        ``model``
            Size of a model that is not the published one (keys of :data:`PUBLISHED`).
    """

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__(resolved)
        self.network: nn.Module | None = None

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Check the settings, and hash the weights."""
        given = settings_of_trunk(setting, required=("weights",), optional=_OPTIONS)
        weights = weights_file(given["weights"])
        size = {**PUBLISHED, **(given["model"] or {})}
        if size.keys() != PUBLISHED.keys():
            raise UserError(
                f"trunk.model has {', '.join(given['model'])}; it can have {', '.join(PUBLISHED)}."
            )
        positions, left = divmod(given["width"], BIN_BP)
        if left:
            raise UserError(
                f"Enformer reads windows of a multiple of {BIN_BP} bp; width is {given['width']}."
            )
        gamma = positions == GAMMA_POSITIONS if given["gamma"] is None else given["gamma"]
        if gamma and positions != GAMMA_POSITIONS:
            raise UserError(
                f"The gamma basis is known for {GAMMA_POSITIONS * BIN_BP:,} bp only; width is "
                f"{given['width']:,}. Leave out gamma, or set it to false."
            )
        bins = given["target_length"] or min(896, positions)
        if not 0 < bins <= positions or (positions - bins) % 2:
            raise UserError(
                f"target_length is {bins}; a window of {given['width']:,} bp has {positions} "
                "bins, of which as many have to go on either side."
            )
        flags = {"gamma": gamma, "target_length": bins, "pointwise": given["pointwise"]}
        crop = (positions - bins) // 2
        return {
            "weights": str(weights),
            "model": size,
            **flags,
            "layout": {
                "bins": bins,
                "channels": size["dim"] * (2 if given["pointwise"] else 1),
                "bin_bp": BIN_BP,
                "first_bin": crop * BIN_BP - given["width"] // 2,
            },
            "window": {"width": given["width"], **SEQUENCE_WINDOW},
            "fingerprint": {"weights": file_digest(weights), "model": size, **flags},
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "EnformerTrunk":
        """Make the network and load its weights, or know the layout only."""
        trunk = cls(resolved)
        if not weights:
            return trunk
        path = Path(resolved["weights"])
        if not path.is_file() or file_digest(path) != resolved["fingerprint"]["weights"]:
            raise UserError(
                f"{path} does not hold the weights of Enformer that were used before. Put them "
                "back, or name them again in model.trunk."
            )
        with torch.device("meta"):
            trunk.network = make_network(resolved)
        load_weights(trunk.network, path)
        return trunk

    def features(self, batch: Batch) -> Tensor:
        """Run the trunk on one-hot bases [B, L, 4]."""
        if self.network is None:
            raise UserError("The trunk was built without its weights; build it with them.")
        return self.network(enformer_bases(batch.codes, batch.keep))


def enformer_bases(codes: Tensor, keep: Tensor | None) -> Tensor:
    """Encode bases as Enformer was trained: [B, L, 4], N is zero, beyond the chromosome 0.25.

    Parameters
    ----------
    codes
        uint8 [B, L], or relaxed [B, L, 4].
    keep
        bool [B, L]; N that does not count is taken to lie beyond the chromosome (a blacklisted N
        too).
    """
    bases = one_hot(codes)
    if keep is None:
        return bases
    beyond = ~keep & (bases.sum(-1) == 0)
    return bases.masked_fill(beyond.unsqueeze(-1), 0.25)


def make_network(resolved: Mapping[str, Any]) -> nn.Sequential:
    """Make the layers that give the features, with random weights.

    Raises
    ------
    UserError
        Without the package.
    """
    try:
        package = import_module("enformer_pytorch")
    except ImportError as error:
        raise UserError(
            f"Enformer needs a package that is not here ({error.name}). Install it with "
            "`pip install 'seq2expr[enformer]'`."
        ) from error
    model = package.Enformer.from_hparams(
        **resolved["model"],
        output_heads={},
        target_length=resolved["target_length"],
        use_tf_gamma=resolved["gamma"],
    )
    return model.trunk if resolved["pointwise"] else model.trunk[:-1]


def load_weights(network: nn.Sequential, path: Path) -> None:
    """Load the trunk out of a checkpoint of the whole model.

    Raises
    ------
    UserError
        When the checkpoint is not of this network.
    """
    saved, wanted = read_weights(path), network.state_dict()
    found = {}
    for name, value in saved.items():
        part, _, rest = name.removeprefix("_trunk.").partition(".")
        name = f"{_PARTS.get(part, part)}.{rest}"
        if name in wanted:
            found[name] = value.float() if value.is_floating_point() else value
    wrong = [n for n, v in wanted.items() if n not in found or found[n].shape != v.shape]
    if wrong:
        raise UserError(
            f"{path} does not fit: {len(wrong)} of {len(wanted)} tensors of Enformer are missing "
            f"or of another shape, such as {wrong[0]}. Check trunk.model and the file."
        )
    network.load_state_dict(found, assign=True)


TRUNK = EnformerTrunk
