"""Candidate values of genes, and the answer that a patch gives by choosing among their texts.

Axes: B spots, N training spots, G genes, K bins, E width of the common space.
"""

import torch
from torch import Tensor, nn

TEMPERATURES = torch.logspace(-2.5, 1, 57)
"""Those that are tried."""


class ValueBins(nn.Module):
    """Bins of equal probability: a value that stands for each in a text, and what it answers.

    With z an embedding of a patch and t_b that of the text of bin b, the answer is ``Σ_b v_b
    softmax_b(z · t_b / τ)``. A contrast at its optimum has ``z · t / τ`` equal to ln p(z | t) /
    p(z) and a constant, so that, bins being equally probable, the softmax is the posterior of the
    bin and the answer its mean.

    The value in the text is the middle one of the bin, as measured (0 is 0); the answer is the
    mean of its targets. A gene that was not trained has the bins of all values of all genes that
    are not 0, each standardised; its answer is in standard deviations.

    Parameters
    ----------
    genes, bins, embedding
        G, K and E.

    Attributes
    ----------
    text, zero, answer
        Of each bin of each gene [G, K]: the standardised value of its text, whether it is 0 as
        measured, and the answer.
    keys
        Texts of the bins, embedded [G, K, E]; whoever fits the bins embeds them.
    pooled_text, pooled_answer
        Of the bins [K] of genes that were not trained.
    temperature
        τ.
    """

    def __init__(self, genes: int, bins: int, embedding: int):
        super().__init__()
        self.bins = bins
        self.register_buffer("text", torch.zeros(genes, bins))
        self.register_buffer("zero", torch.zeros(genes, bins, dtype=torch.bool))
        self.register_buffer("answer", torch.zeros(genes, bins))
        self.register_buffer("keys", torch.zeros(genes, bins, embedding))
        self.register_buffer("pooled_text", torch.zeros(bins))
        self.register_buffer("pooled_answer", torch.zeros(bins))
        self.register_buffer("temperature", torch.tensor(1.0))

    def fit(
        self, values: Tensor, zero: Tensor, target: Tensor, known: Tensor, mean: Tensor, sd: Tensor
    ) -> None:
        """Cut the values of training spots into bins.

        Parameters
        ----------
        values
            Standardised [N, G].
        zero
            bool [N, G], whether they are 0 as measured.
        target
            [N, G].
        known
            bool [N, G], whether both were measured.
        mean, sd
            Of the targets [G]; a gene that is not known in any spot has its mean in all bins.
        """
        standard = (target - mean) / sd
        pooled = known & ~zero
        if pooled.any():
            _, text, answer = self._cut(values[pooled], standard[pooled])
            self.pooled_text.copy_(text)
            self.pooled_answer.copy_(answer)
        for gene in range(len(self.text)):
            own = known[:, gene]
            self.answer[gene] = mean[gene]
            if own.any():
                rows, text, answer = self._cut(values[own, gene], target[own, gene])
                self.text[gene], self.answer[gene] = text, answer
                self.zero[gene] = zero[own, gene][rows]

    def _cut(self, values: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return row and value of the middle of each bin [K], and its mean target [K]."""
        levels, level = values.unique(return_inverse=True)
        # Equal values have one text, and so one answer, whatever bins they fall into.
        count = torch.bincount(level, minlength=len(levels))
        total = torch.zeros(len(levels), dtype=torch.float64, device=values.device)
        even = (total.index_add_(0, level, target.double()) / count)[level]
        order = values.argsort(stable=True)
        n, edges = len(values), torch.arange(self.bins + 1, dtype=torch.float64) / self.bins
        first = (edges[:-1] * n).floor().long()
        last = torch.maximum((edges[1:] * n).ceil().long(), first + 1)
        sums = torch.cat([even.new_zeros(1), even[order].cumsum(0)]).cpu()
        answer = (sums[last] - sums[first]) / (last - first)
        middle = order[((edges[:-1] + 0.5 / self.bins) * n).floor().long().to(order.device)]
        return middle, values[middle], answer.to(values)

    def fit_temperature(self, image: Tensor, target: Tensor, known: Tensor, sd: Tensor) -> None:
        """Choose the temperature of the least squared error, in standard deviations.

        Parameters
        ----------
        image
            Embeddings of validation spots [N, E].
        target, known
            [N, G], and where they are known.
        sd
            Of the targets [G].
        """
        errors = []
        for temperature in TEMPERATURES.tolist():
            apart = (self.choose(image, temperature=temperature) - target) / sd
            errors.append(float(apart[known].double().square().mean()))
        self.temperature.fill_(TEMPERATURES[int(torch.tensor(errors).argmin())])

    def choose(self, image: Tensor, *, temperature: float | Tensor | None = None) -> Tensor:
        """Answer embeddings of patches [B, E] for the genes of the run [B, G]."""
        return self._mean(image, self.keys, self.answer, temperature)

    def choose_new(self, image: Tensor, keys: Tensor) -> Tensor:
        """Answer for genes with texts [G', K, E] in standard deviations [B, G']."""
        return self._mean(image, keys, self.pooled_answer.expand(len(keys), -1), None)

    def _mean(
        self, image: Tensor, keys: Tensor, answer: Tensor, temperature: float | Tensor | None
    ) -> Tensor:
        scale = 1 / (self.temperature if temperature is None else temperature)
        with torch.autocast(image.device.type, enabled=False):
            logits = scale * torch.einsum("be,gke->bgk", image.float(), keys.float())
            return (logits.softmax(dim=-1) * answer).sum(-1)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: object) -> None:
        # What an adapter carries may have other genes than its base.
        for name in ("text", "zero", "answer", "keys"):
            stored = state.get(prefix + name)
            if stored is not None and stored.shape != getattr(self, name).shape:
                self.register_buffer(name, torch.zeros_like(stored))
        super()._load_from_state_dict(state, prefix, *args)
