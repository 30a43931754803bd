"""InfoNCE over many pairs, without holding the matrix of their similarities."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def info_nce(
    a: Tensor, b: Tensor, temperature: float, *, symmetric: bool = False, block: int = 2**24
) -> Tensor:
    """Return the InfoNCE of partners (van den Oord et al. 2018) in nats; ln M at chance.

    ``mean_m [logsumexp_n s(a_m, b_n) - s(a_m, b_m)]`` with ``s = cosine / temperature``, and the
    mean over sets, where there are several.

    Parameters
    ----------
    a, b
        Two embeddings of the same M things [M, D], or of those of N sets [N, M, D], which are
        told apart within each set only. Of any length and precision; computed in float32.
    temperature
        Of the cosines.
    symmetric
        The mean of both directions, instead of that from ``a`` to ``b``.
    block
        About how many similarities are held at once. The default is 64 MiB of them: the C library
        gives memory of that size back at once, where smaller pieces leave holes in its heap.

    Notes
    -----
    Blocks of similarities are reduced and forgotten, and made again for the gradient. So memory
    grows with M, not with M²; the price is one product of matrices more than the three of a
    gradient.
    """
    if a.dim() == 2:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    sets, pairs = a.shape[:2]
    together = max(block // pairs**2, 1)
    with torch.autocast(a.device.type, enabled=False):
        total = sum(
            _sets(some, partners, temperature, symmetric, max(block // (len(some) * pairs), 1))
            for some, partners in zip(a.split(together), b.split(together), strict=True)
        )
    return total / (sets * pairs)


def _sets(a: Tensor, b: Tensor, temperature: float, symmetric: bool, rows: int) -> Tensor:
    """Sum the loss over all things of some sets, so many rows of similarities at a time."""
    b = F.normalize(b.float(), dim=2)
    ahead, back, own = [], [], []
    for start, part in zip(range(0, a.shape[1], rows), a.split(rows, dim=1), strict=True):
        found = checkpoint(
            *(_block, part, b, start, temperature),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for kept, value in zip((ahead, back, own), found, strict=True):
            kept.append(value)
    partners = torch.cat(own, dim=1).sum()
    loss = torch.cat(ahead, dim=1).sum() - partners
    if symmetric:
        loss = (loss + torch.stack(back).logsumexp(0).sum() - partners) / 2
    return loss


def _block(a: Tensor, b: Tensor, start: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce a block of similarities over its columns [N, R], its rows [N, M]; and the partners.

    Row r of the block is row ``start + r`` of all, whose partner is in that column.
    """
    logits = F.normalize(a.float(), dim=2) @ b.transpose(1, 2) / temperature
    partners = logits.diagonal(start, dim1=1, dim2=2)
    return logits.logsumexp(2), logits.logsumexp(1), partners.clone()
