"""Sentences of genes and their values, read in parallel, and one text of any set of them.

After what is known of CoMTIP (Qian et al. 2025, arXiv 2509.16892), of which the abstract alone
could be read: that the sentence of each gene is encoded by itself, with dedicated embeddings of
gene and value. Here a sentence is not spelled out: a name is embedded once, and a value by a
network. Axes: B spots, G genes of the bank, N genes of a text, T numbers of a name, W width, E
width of the common space.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.model.attention import Block
from seq2expr.model.gene_paths import GeneEncoder


class GeneSentences(nn.Module):
    """From names and values of genes to one embedding of unit length.

    A sentence is ``n + (1 + A n) ∘ e``, n the embedding of the name and e that of the value, an
    MLP of ``[value, value = 0]``: the product lets a gene that is known by its name alone turn
    its value where it belongs. A transformer without positions lets the sentences of a text see
    one another, and one learned query pools them.

    Parameters
    ----------
    genes
        G.
    vectors
        Names of the genes [G, T]; None: vectors of their own that are learned.
    width, embedding
        W and E.
    depth, heads, mlp_ratio, dropout
        Of the blocks (see :class:`seq2expr.model.attention.Block`).
    centre
        Whether names are scaled by the mean and spread of those of all genes.
    """

    def __init__(
        self,
        genes: int,
        vectors: Tensor | None,
        width: int,
        embedding: int,
        *,
        depth: int,
        heads: int,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        centre: bool = True,
    ):
        super().__init__()
        if vectors is None:
            self.bank = nn.Parameter(torch.randn(genes, width))
        else:
            self.register_buffer("bank", vectors)
        d_name, centre = self.bank.shape[1], centre and vectors is not None
        self.name = GeneEncoder(d_name, width, depth=0, heads=heads, centre=centre)
        self.value = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.bind = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1, bias=False)
        self.out = nn.Linear(width, embedding)

    def names(self, asked: Tensor | None = None) -> Tensor:
        """Embed the names of the genes as [G, W], or those that are asked for [G', T]."""
        return self.name(self.bank, None if asked is None else asked.to(self.bank))

    def values(self, values: Tensor, zero: Tensor) -> Tensor:
        """Embed standardised values [...], and whether they are 0 as measured, as [..., W]."""
        return self.value(torch.stack([values, zero.to(values)], dim=-1))

    def read(self, names: Tensor, values: Tensor) -> Tensor:
        """Read embeddings of names and values [B, N, W] as texts of unit length [B, E]."""
        states = names + (1 + self.bind(names)) * values
        for block in self.blocks:
            states = block(states)
        states = self.norm(states)
        # One gene has all the weight, whatever its score.
        shares = self.score(states).float().softmax(dim=1).to(states)
        return F.normalize(self.out((shares * states).sum(1)).float(), dim=-1)

    def forward(self, names: Tensor, values: Tensor, zero: Tensor) -> Tensor:
        """Read names [B, N, W] with their values [B, N] as texts of unit length [B, E]."""
        return self.read(names, self.values(values, zero))

    def single(self, names: Tensor, values: Tensor, zero: Tensor) -> Tensor:
        """Read each sentence as a text of its own.

        Parameters
        ----------
        names
            [N, W].
        values, zero
            [..., N].

        Returns
        -------
        Of unit length [..., N, E].
        """
        embedded = self.values(values, zero)
        each = names.expand_as(embedded)
        texts = self.read(each.flatten(0, -2).unsqueeze(1), embedded.flatten(0, -2).unsqueeze(1))
        return texts.unflatten(0, values.shape)
