"""From windows to batches, and what is added: prompts of genes, features of a frozen trunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from seq2expr.dna.windows import Sites, WindowArrays, Windows
from seq2expr.errors import UserError
from seq2expr.learn.trunk_cache import TrunkCache
from seq2expr.model.batch import Batch
from seq2expr.model.language import open_tokenizer
from seq2expr.model.system import Ensemble, System, members_in
from seq2expr.model.trunks import Trunk
from seq2expr.model.window_system import TrunkStatistics
from seq2expr.text.tables import read_texts
from seq2expr.text.tokens import PromptSettings, PromptTokens, tokenise

SAMPLE = 512
"""Windows over which the channels of a trunk are described."""

_BATCH = 32


def to_batch(ids: Sequence[str], arrays: WindowArrays, windows: Windows) -> Batch:
    """Wrap arrays of a read as a batch, without copying."""
    batch = Batch(ids=list(ids), codes=torch.from_numpy(arrays.codes))
    if arrays.signal is not None:
        batch["signal"] = torch.from_numpy(arrays.signal)
        batch["signal_scale"] = torch.from_numpy(windows.scales)
    if arrays.profile is not None:
        batch["profile"] = torch.from_numpy(arrays.profile)
        batch["profile_scale"] = torch.from_numpy(windows.profile_scales)
    if arrays.keep is not None:
        batch["keep"] = torch.from_numpy(arrays.keep)
    return batch


@dataclass(frozen=True)
class Extras:
    """What is added to a batch of windows.

    Parameters
    ----------
    prompts
        Of every gene of the annotation; None where the system reads no text.
    trunk
        Features by the content of a window; None where the system has no trunk, or runs it
        itself.
    """

    prompts: PromptTokens | None = None
    trunk: TrunkCache | None = None

    def add_prompts(self, batch: Batch) -> None:
        """Add the prompts of the genes of a batch."""
        if self.prompts is not None:
            batch["text"], batch["text_mask"] = self.prompts.padded(batch.ids)

    def add_trunk(self, batch: Batch) -> None:
        """Add the features of its windows."""
        if self.trunk is not None:
            batch["trunk"] = self.trunk.features(batch)

    def prepare(self, windows: Windows, sites: Sites, *, both_strands: bool, what: str) -> None:
        """Compute the features of windows that are asked for often, where they are missing."""
        if self.trunk is None:
            return
        if both_strands:
            turned = np.concatenate([sites.minus, ~sites.minus])
            sites = _take(sites, np.tile(np.arange(len(sites.gene_id)), 2))._replace(minus=turned)
        self.trunk.prepare(_Batches(windows, sites), len(sites.gene_id), what)

    def fit_trunk(self, system: System, windows: Windows, sites: Sites) -> TrunkStatistics | None:
        """Describe the channels of the trunk over some windows; None where there is no trunk.

        At most :data:`SAMPLE` windows are taken, evenly.
        """
        if getattr(system, "trunk", None) is None:
            return None
        picked = np.linspace(0, len(sites.gene_id) - 1, min(SAMPLE, len(sites.gene_id)))
        raw, read, squares, n_raw, n_read = 0.0, 0.0, 0.0, 0, 0
        for batch in _Batches(windows, _take(sites, np.unique(picked.astype(np.int64)))):
            found = self.trunk.features(batch) if self.trunk else system.trunk(batch)
            values = found.double().flatten(0, 1)
            seen = system.read_trunk(found).double().flatten(0, 1)
            raw, read = raw + values.sum(0), read + seen.sum(0)
            squares = squares + seen.square().sum(0)
            n_raw, n_read = n_raw + len(values), n_read + len(seen)
        mean = read / n_read
        sd = (squares / n_read - mean.square()).clamp_min(0).sqrt()
        return TrunkStatistics((raw / n_raw).float(), mean.float(), sd.float())


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class _Batches:
    """Batches of windows, read anew at each pass."""

    windows: Windows
    sites: Sites

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.sites.gene_id)
        for start in range(0, count, _BATCH):
            part = _take(self.sites, np.arange(start, min(start + _BATCH, count)))
            yield to_batch(part.gene_id, self.windows.read(part), self.windows)


def _take(sites: Sites, rows: np.ndarray) -> Sites:
    ids = [sites.gene_id[row] for row in rows]
    return Sites(ids, sites.chrom[rows], sites.tss[rows], sites.minus[rows])


def open_extras(
    model: System | Ensemble, texts: Sequence[Path], genes: pd.DataFrame, *, cache: bool = True
) -> Extras:
    """Open what a model reads beside the windows.

    Parameters
    ----------
    model
        The system, or members of one configuration.
    texts
        Tables of gene descriptions.
    genes
        All genes of the annotation (a shuffle is among them).
    cache
        Take the features of the trunk from the cache.

    Raises
    ------
    UserError
        When the model reads text and there is no table, or the prompts do not fit the model.
    """
    system = members_in(model)[0]
    prompts = None
    if "text" in system.needs:
        prompts = _open_prompts(system, texts, genes)
        system.check_text(prompts.longest)
    trunks = [getattr(member, "trunk", None) for member in members_in(model)]
    cached = cache and _share_features(trunks) and system.vectors > 0
    return Extras(prompts, TrunkCache(trunks[0]) if cached else None)


def _share_features(trunks: Sequence[Trunk | None]) -> bool:
    """Tell whether members have one trunk, whose features are those of its identity."""
    if None in trunks or len({trunk.identity for trunk in trunks}) > 1:
        return False
    # An adapter of peft changes features and leaves the identity as it is.
    return not any(hasattr(part, "_active_adapter") for t in trunks for part in t.modules())


def _open_prompts(system: System, paths: Sequence[Path], genes: pd.DataFrame) -> PromptTokens:
    """Render and tokenise the prompts of all genes."""
    if not paths:
        raise UserError(
            "The model reads gene descriptions, and no table of them is given. Add --text TABLE, "
            "or data.text for training; model.prompt.mode=none leaves text out."
        )
    config = system.config
    texts = read_texts(
        paths, genes["gene_id"].tolist(), gene_names=genes["gene_name"].fillna("").tolist()
    )
    tokenizer = open_tokenizer(config.llm, revision=config.llm_revision)
    settings = PromptSettings.of(config.prompt)
    return tokenise(texts, settings, tokenizer, bins=system.vectors)
