"""A DNA language model of transformers as the trunk: its hidden states, averaged over bins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig

from seq2expr.dna.genome import decode, reverse_complement
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.hub import fetch_model
from seq2expr.model.trunks import Trunk, sequence_window, settings_of_trunk
from seq2expr.store import file_digest

TILES = 16
"""Tiles that are run at once."""

_OPTIONS = {
    "revision": None,
    "bin_bp": 128,
    "context": None,
    "channels": None,
    "trust_remote_code": False,
    "average_strands": False,
}


class Tokens(NamedTuple):
    """A window as tokens.

    Attributes
    ----------
    ids
        Token ids, without those of the frame.
    lengths
        Bases of each token.
    """

    ids: list[int]
    lengths: list[int]


class HubTrunk(Trunk):
    """Last hidden states of a model by hub id or path, averaged over the bases of each bin.

    A window that has more tokens than the model can read is cut into tiles that do not overlap,
    each within the model's own frame of special tokens: a token sees nothing of the next tile.
    Tiles of one length are run together, so nothing is padded, and a window does not depend on
    others. Of models that double their hidden states over both strands (Caduceus-PS), give
    ``channels``; the halves are kept side by side.

    Parameters
    ----------
    resolved
        What :func:`seq2expr.model.trunks.resolve_trunk` says of a setting with

        ``model``, ``revision``
            Hub id or directory.
        ``window``
            ``width`` in bp, and ``tss_index`` (by default the middle).
        ``bin_bp``
            Bin width.
        ``context``
            Tokens that the model reads, by default as its configuration or tokenizer says.
        ``channels``
            Width of the hidden states, by default as its configuration says.
        ``trust_remote_code``
            Run the code that comes with the model.
        ``average_strands``
            Average with the features of the reverse complement, bins turned around.
    """

    def __init__(self, resolved: Mapping[str, Any]):
        super().__init__(resolved)
        self.network: nn.Module | None = None
        self.tokenizer: Any = None

    @classmethod
    def resolve(cls, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Read the configuration of the model, and hash its files."""
        given = settings_of_trunk(setting, required=("model", "window"), optional=_OPTIONS)
        window = sequence_window(given["window"])
        width, bin_bp, anchor = window["width"], given["bin_bp"], window["tss_index"]
        if width % bin_bp:
            raise UserError(
                f"A window of {width} bp cannot be cut into bins of {bin_bp} bp; correct "
                "trunk.window or trunk.bin_bp."
            )
        source = fetch_model(str(given["model"]), revision=given["revision"])
        config = _open(AutoConfig, source, trust_remote_code=given["trust_remote_code"])
        channels = given["channels"] or _first(config, "hidden_size", "d_model", "n_embd")
        if channels is None:
            raise UserError(
                f"{given['model']} does not say the width of its hidden states; give "
                "trunk.channels."
            )
        flags = {name: given[name] for name in ("context", "average_strands")}
        return {
            "model": str(given["model"]),
            "source": str(source.resolve()),
            "revision": given["revision"],
            "trust_remote_code": given["trust_remote_code"],
            **flags,
            "layout": {
                "bins": width // bin_bp,
                "channels": channels,
                "bin_bp": bin_bp,
                "first_bin": -(width // 2 if anchor is None else anchor),
            },
            "window": window,
            "fingerprint": {"files": _hashes(source), **flags},
        }

    @classmethod
    def build(cls, resolved: Mapping[str, Any], *, weights: bool) -> "HubTrunk":
        """Load model and tokenizer, or know the layout only."""
        trunk = cls(resolved)
        if not weights:
            return trunk
        source = Path(resolved["source"])
        if not source.is_dir():
            source = fetch_model(resolved["model"], revision=resolved["revision"])
        if _hashes(source) != resolved["fingerprint"]["files"]:
            raise UserError(
                f"{source} does not hold the model {resolved['model']} that was used before. Put "
                "it back, or name it again in model.trunk."
            )
        trust = resolved["trust_remote_code"]
        trunk.tokenizer = _open(AutoTokenizer, source, trust_remote_code=trust)
        trunk.network = _open(AutoModel, source, trust_remote_code=trust, dtype=torch.float32)
        return trunk

    def features(self, batch: Batch) -> Tensor:
        """Read windows [B, L] as text; relaxed bases have no tokens."""
        if self.network is None:
            raise UserError("The trunk was built without its weights; build it with them.")
        if batch.codes.is_floating_point():
            raise UserError(
                "The trunk reads tokens, so its features cannot be differentiated by the bases. "
                "Take a method that changes whole bases, such as ism."
            )
        codes = batch.codes.cpu().numpy()
        forward = self._pooled([decode(row) for row in codes])
        if not self.resolved["average_strands"]:
            return forward
        turned = self._pooled([decode(reverse_complement(row)) for row in codes])
        return (forward + turned.flip(1)) / 2

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        """Average the hidden states of each text over its bins: [B, N, d]."""
        tokens = [self._tokens(text) for text in texts]
        states = self._states([row.ids for row in tokens])
        bins, bin_bp = self.layout.bins, self.layout.bin_bp
        return torch.stack(
            [
                bin_means(hidden, torch.tensor(row.lengths), bins=bins, bin_bp=bin_bp)
                for hidden, row in zip(states, tokens, strict=True)
            ]
        )

    def _tokens(self, text: str) -> Tokens:
        """Cut a window into tokens; every base has to be in one."""
        fast = self.tokenizer.is_fast
        read = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False
        )
        if fast:
            lengths = [stop - start for start, stop in read["offset_mapping"]]
        else:
            names = self.tokenizer.convert_ids_to_tokens(read["input_ids"])
            lengths = [len(name) for name in names]
        if sum(lengths) != len(text):
            raise UserError(
                f"The tokenizer of {self.resolved['model']} covers {sum(lengths):,} of "
                f"{len(text):,} bases. Use a model whose tokens cover each base once."
            )
        return Tokens(read["input_ids"], lengths)

    def _states(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """Run the tiles of all rows: hidden states [T, d] of the tokens of each."""
        before, after = self._frame()
        size = self._context() - len(before) - len(after)
        tiles = [
            (row, start, ids[start : start + size])
            for row, ids in enumerate(rows)
            for start in range(0, len(ids), size)
        ]
        device = next(self.network.parameters()).device
        found: dict[tuple[int, int], Tensor] = {}
        tiles.sort(key=lambda tile: len(tile[2]))
        while tiles:
            length = len(tiles[0][2])
            part = [tile for tile in tiles[:TILES] if len(tile[2]) == length]
            tiles = tiles[len(part) :]
            ids = torch.tensor([[*before, *tile[2], *after] for tile in part], device=device)
            hidden = self.network(input_ids=ids)[0][:, len(before) : len(before) + length]
            for (row, start, _), states in zip(part, hidden, strict=True):
                found[row, start] = states
        return [
            torch.cat([found[row, start] for start in range(0, len(ids), size)])
            for row, ids in enumerate(rows)
        ]

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        bare = self.tokenizer("ACGTACGT", add_special_tokens=False)["input_ids"]
        framed = self.tokenizer("ACGTACGT")["input_ids"]
        before = next(at for at in range(len(framed)) if framed[at : at + len(bare)] == bare)
        return framed[:before], framed[before + len(bare) :]

    def _context(self) -> int:
        """Return the number of tokens that the model reads, frame included."""
        limits = [
            self.resolved["context"],
            _first(self.network.config, "max_position_embeddings", "max_seq_len"),
            self.tokenizer.model_max_length,
        ]
        if limits[0] is not None:
            return limits[0]
        return min(limit for limit in limits if limit is not None)


def bin_means(states: Tensor, lengths: Tensor, *, bins: int, bin_bp: int) -> Tensor:
    """Average the states of tokens over bins, each weighted by the bases it has there.

    Parameters
    ----------
    states
        [T, d].
    lengths
        Bases of each token, int64 [T]; together ``bins * bin_bp``.

    Returns
    -------
    Tensor
        [bins, d].
    """
    ends = lengths.cumsum(0)
    edges = torch.cat([torch.arange(0, bins * bin_bp + 1, bin_bp), ends]).unique()
    starts = edges[:-1]
    shares = (edges.diff() / bin_bp).to(states)
    token = torch.searchsorted(ends, starts, right=True).to(states.device)
    out = states.new_zeros(bins, states.shape[1])
    place = (starts // bin_bp).to(states.device)
    return out.index_add(0, place, states[token] * shares.unsqueeze(1))


def _open(kind: type, source: Path, **settings: Any) -> Any:
    """Load a part of a model from its directory."""
    try:
        return kind.from_pretrained(source, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{source} cannot be loaded as a model of transformers: {error}. Fetch it again; if "
            "it brings its own code, read that and set trunk.trust_remote_code."
        ) from error


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)


def _hashes(source: Path) -> dict[str, str]:
    """Hash what makes the model: every file beside the description."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    return {
        path.name: file_digest(path)
        for path in files
        if path.suffix != ".md" and not path.name.startswith(".")
    }


TRUNK = HubTrunk
