"""Windows and models for the methods: some whose answers can be worked out by hand."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2expr.interpret.probe import Probe
from seq2expr.model.batch import Batch, Encoded, Prediction
from seq2expr.model.layers import one_hot
from seq2expr.model.window_system import WindowConfig, WindowSystem
from tests.toy import toy_batch


def one_row(batch: Batch, row: int = -1) -> Batch:
    """One window (by default the one that passes a chromosome end), without its targets."""
    row = range(len(batch.ids))[row]
    fields = {k: v if k == "signal_scale" else v[row : row + 1] for k, v in batch.items()}
    return Batch(**{k: v for k, v in fields.items() if not k.startswith("target")})


def window(length: int = 60, *, n: int = 0, seed: int = 0, **fields: object) -> Batch:
    """Only a sequence, of which the first ``n`` bases are N."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 4, (1, length), generator=random, dtype=torch.uint8)
    codes[:, :n] = 4
    return Batch(ids=["gene"], codes=codes, **fields)


class Formula(nn.Module):
    """A model that is a function of the weighted bases [B, L, 4]; it remembers what it sees."""

    def __init__(self, function: Callable[[Tensor], Tensor], length: int = 60, seed: int = 0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(length, 4, generator=random))
        self.function = function
        self.seen: list[dict] = []

    def forward(self, **fields: object) -> Prediction:
        self.seen.append(fields)
        weighted = one_hot(fields["codes"], self.weight.dtype) * self.weight
        return Prediction(
            mean=torch.stack([self.function(weighted)] * 2, 1) * torch.tensor([1, 3])
        )


def linear(weighted: Tensor) -> Tensor:
    return weighted.sum((1, 2))


class Plain(WindowSystem):
    """Another system: one convolution over the bases, and the mean over positions."""

    config_class = WindowConfig

    def __init__(self, config: WindowConfig, *, activation: type[nn.Module] = nn.GELU):
        super().__init__(config)
        self.conv = nn.Conv1d(4, 6, 9, padding=4)
        self.activation = activation()
        self.build_heads(6, 6)
        self.post_init()

    def encode(self, batch: Batch) -> Encoded:
        bases = one_hot(batch.codes, self.conv.weight.dtype).transpose(1, 2)
        return Encoded(site=F.layer_norm(self.activation(self.conv(bases)).mean(2), (6,)))


def plain(width: int = 120, **settings: object) -> Plain:
    torch.manual_seed(0)
    head = {"hidden": 8, "depth": 1}
    return Plain(WindowConfig(width=width, targets=["a", "b"], head=head, **settings)).eval()


def probe_of(model: nn.Module, row: Batch | None = None, **settings: object) -> Probe:
    row = one_row(toy_batch()) if row is None else row
    return Probe(model, row, **({"anchor": row.codes.shape[1] // 2} | settings))
