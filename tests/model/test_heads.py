import pytest
import torch
from torch import nn

from seq2expr.errors import UserError
from seq2expr.model.heads import ExpressionHead, ProfileHead


def widths(head):
    return [
        (m.in_features, m.out_features) for m in head.net.modules() if isinstance(m, nn.Linear)
    ]


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"kind": "linear"}, [(5, 2)]),
        ({"hidden": 7}, [(5, 7), (7, 7), (7, 2)]),
        ({"hidden": 7, "depth": 1, "dropout": 0.5, "activation": "gelu"}, [(5, 7), (7, 2)]),
        ({"depth": 0}, [(5, 2)]),
    ],
)
def test_kinds(settings, layers):
    head = ExpressionHead(5, ["a", "b"], **settings)
    assert widths(head) == layers
    assert head(torch.randn(3, 5)).shape == (3, 2)
    dropouts = [m.p for m in head.modules() if isinstance(m, nn.Dropout)]
    assert dropouts == ([0.5] if "dropout" in settings else [])
    assert any(isinstance(m, nn.GELU) for m in head.modules()) == ("activation" in settings)


def test_published_head_has_its_parameter_count():
    assert sum(p.numel() for p in ExpressionHead(137, ["cage"]).parameters()) == 34_305


def test_identity_has_no_parameters_and_answers_the_site():
    head, site = ExpressionHead(2, ["a", "b"], kind="identity"), torch.randn(3, 2)
    assert not list(head.parameters())
    assert torch.equal(head(site), site)


def test_answers_are_in_the_units_of_the_targets():
    scaled = ExpressionHead(3, ["a", "b"], mean=[10.0, -1.0], sd=[2.0, 0.5])
    plain = ExpressionHead(3, ["a", "b"])
    plain.net = scaled.net
    site = torch.randn(4, 3)
    want = plain(site) * torch.tensor([2.0, 0.5]) + torch.tensor([10.0, -1.0])
    torch.testing.assert_close(scaled(site), want)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse"])
def test_loss_is_the_weighted_mean_over_measured_cells_in_standard_units(kind):
    head = ExpressionHead(
        3, ["a", "b"], mean=[10.0, -1.0], sd=[2.0, 0.5], weights=[1.0, 0.3], loss=kind
    )
    predicted = torch.tensor([[10.0, -1.0], [15.0, 0.0], [9.0, 4.0]])
    target = torch.tensor([[11.0, -1.2], [10.0, 9.0], [9.5, 1.0]])
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    total = weight = 0.0
    for row, column in mask.nonzero().tolist():
        error = abs(predicted[row, column] - target[row, column]).item() / [2.0, 0.5][column]
        huber = error**2 / 2 if error < 1 else error - 0.5
        total += [1.0, 0.3][column] * (huber if kind == "smooth_l1" else error**2)
        weight += [1.0, 0.3][column]
    assert head.loss(predicted, target, mask).item() == pytest.approx(total / weight, rel=1e-6)
    everything = torch.ones_like(mask)
    torch.testing.assert_close(
        head.loss(predicted, target), head.loss(predicted, target, everything)
    )


VECTORS = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def bank_head(vectors=VECTORS, **settings):
    torch.manual_seed(0)
    names = [f"g{gene}" for gene in range(4)]
    head = ExpressionHead(5, names, kind="genebank", hidden=7, vectors=vectors, **settings)
    if vectors is not None:
        with torch.no_grad():
            head.net.level.weight.normal_()
            head.net.level.bias.fill_(0.3)
    return head


def test_a_genebank_is_an_mlp_whose_last_layer_is_made_from_the_genes():
    head = bank_head(depth=1, mean=[1.0, 2.0, 3.0, 4.0], sd=[1.0, 0.5, 2.0, 3.0])
    site = torch.randn(6, 5)
    states, net = head.net.site(site), head.net
    assert [type(layer) for layer in net.site] == [nn.Linear, nn.ReLU, nn.Linear]
    middle = VECTORS.mean(0)
    spread = ((VECTORS - middle) ** 2).mean() ** 0.5
    for b in range(6):
        for g in range(4):
            z = (VECTORS[g] - middle) / spread
            row = (net.gene.weight @ z + net.gene.bias) / 7**0.5
            score = states[b] @ row + net.level.weight[0] @ z + net.level.bias[0]
            want = score * head.sd[g] + head.mean[g]
            torch.testing.assert_close(head(site)[b, g], want)


def test_a_genebank_answers_whoever_is_asked_in_standard_units():
    head, site = bank_head(mean=[1.0, 2.0, 3.0, 4.0], sd=[1.0, 0.5, 2.0, 3.0]), torch.randn(6, 5)
    trained = head(site, standardised=True)
    torch.testing.assert_close(trained * head.sd + head.mean, head(site))
    torch.testing.assert_close(head(site, VECTORS[[2, 0]]), trained[:, [2, 0]])
    both = head(site, torch.cat([VECTORS[:1], torch.randn(2, 3)]))  # whoever is asked beside it
    torch.testing.assert_close(both[:, :1], trained[:, :1])
    # Where the bank lies and how large its numbers are says nothing.
    moved = bank_head(10 * VECTORS + 3, mean=head.mean.tolist(), sd=head.sd.tolist())
    torch.testing.assert_close(moved(site), head(site), rtol=1e-4, atol=1e-4)


def test_a_genebank_without_vectors_learns_weights_of_each_gene():
    head = bank_head(None, depth=1)
    assert widths(head) == [(5, 7), (7, 7), (7, 4)]
    assert head.vectors is None
    assert head(torch.randn(2, 5)).shape == (2, 4)


def test_a_genebank_starts_near_the_mean_of_every_gene():
    head = ExpressionHead(5, ["a"] * 4, kind="genebank", vectors=VECTORS, mean=[9.0] * 4)
    assert not any(part.any() for part in head.net.level.parameters())
    assert (head(torch.randn(50, 5)) - 9).abs().mean() < 0.5


@pytest.mark.parametrize("shape", [(4, 3), (6, 3), (6, 2)])
def test_a_head_takes_over_the_bank_that_is_stored(shape):
    other = ExpressionHead(5, ["t"] * shape[0], kind="genebank", vectors=torch.randn(shape))
    head = ExpressionHead(5, ["t"] * 4, kind="genebank", vectors=VECTORS)
    head.load_state_dict(other.state_dict())
    site = torch.randn(3, 5)
    assert torch.equal(head(site), other(site))


def test_vectors_have_to_belong_to_the_head():
    with pytest.raises(UserError, match="genebank, and 4 of 5 genes have a vector"):
        ExpressionHead(5, ["t"] * 5, kind="genebank", vectors=VECTORS)
    with pytest.raises(UserError, match="is 'mlp', which reads no vectors of genes"):
        ExpressionHead(5, ["t"] * 4, vectors=VECTORS)


def test_a_shared_head_is_one_layer_for_the_sites_of_all_genes():
    head, site = ExpressionHead(5, ["a", "b"], kind="shared", sd=[2.0, 3.0]), torch.randn(3, 2, 5)
    assert widths(head) == [(5, 1)]
    want = head.net(site).squeeze(2) * torch.tensor([2.0, 3.0])
    torch.testing.assert_close(head(site), want)
    assert head(torch.randn(3, 9, 5), standardised=True).shape == (3, 9)


def test_loss_of_a_batch_without_any_target_is_zero():
    head = ExpressionHead(3, ["a"])
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    assert head.loss(torch.ones(2, 1), torch.zeros(2, 1), nothing).item() == 0


@pytest.mark.parametrize("name", ["kind", "loss", "activation"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(UserError, match=rf"model\.head\.{name} is 'huge'; it can be "):
        ExpressionHead(3, ["a"], **{name: "huge"})


def test_profile_loss_compares_sums_over_the_bases_of_a_position():
    head = ProfileHead(4, 2)
    predicted = head(torch.randn(3, 5, 4))
    assert predicted.shape == (3, 2, 5)
    stored, scale = torch.rand(3, 2, 20), torch.tensor([2.0, 0.5])
    loss = head.loss(predicted, stored, scale, bin_bp=3)
    want = 0.0
    for row in range(3):
        for channel in range(2):
            for position in range(5):
                means = stored[row, channel, 4 * position : 4 * position + 4] * scale[channel]
                want += (predicted[row, channel, position] - (1 + 3 * means.sum()).log()) ** 2
    torch.testing.assert_close(loss, want / 30)


def test_profile_bins_have_to_fall_into_positions():
    head = ProfileHead(4, 1)
    with pytest.raises(
        UserError, match="6 bins of the target tracks do not fall into 4 positions"
    ):
        head.loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 6), torch.ones(1), bin_bp=1)
