import pytest
import torch
from torch.nn import functional as F

from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.colour import optical_density, ruifrok
from seq2expr.model.stain import linear_limit
from seq2expr.model.system import System
from seq2expr.systems.nsl import NSL, NSLConfig

GRID = 4
LAYOUTS = ("v1", "v2")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def make(genes=3, seed=0, **settings):
    settings = {"encoder": {"kind": "od", "grid": GRID}, "restarts": 3} | settings
    torch.manual_seed(seed)
    return NSL(NSLConfig(targets=[f"g{i}" for i in range(genes)], **settings)).eval()


def spots(rows=6, genes=3, seed=1):
    """Spots with the features of their patches."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, genes, generator=draw)
    return Batch(
        ids=[f"s{i}" for i in range(rows)],
        spot_tokens=torch.rand(rows, GRID**2, 3, generator=draw),
        target=target,
        target_mask=torch.ones_like(target, dtype=torch.bool),
    )


def unlabelled(batch, rows=slice(None)):
    return Batch(ids=batch.ids[rows], spot_tokens=batch.spot_tokens[rows])


def answer(system, batch):
    with torch.no_grad():
        return system(**unlabelled(batch)).mean


def fit(system, batch, steps, lr=1e-2):
    system.train()
    optimiser = torch.optim.Adam(system.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = system(**batch).loss
        loss.backward()
        optimiser.step()
    return system.eval()


def by_hand(weights, layout, sigma, tokens, gene):
    """The formulas of the module, one spot after the other."""
    found = []
    for od in tokens.double():
        if layout == "v1":
            w, b = weights["vectors"][gene], weights["offset"][gene]
            means = [sigma(od @ w[k] + b[k]).mean() for k in range(2)]
            level = weights["intercept"][gene]
        else:
            inverse = torch.linalg.inv(weights["matrix"][gene])
            means = [sigma(od @ inverse)[:, k].mean() for k in range(2)]
            level = 0.0
        found.append(level + sum(weights["weight"][gene][k] * means[k] for k in range(2)))
    return torch.stack(found)


# Answers


@every_layout
@pytest.mark.parametrize(
    ("activation", "sigma"),
    [("softplus", F.softplus), ("sigmoid", torch.sigmoid), ("relu", torch.relu)],
)
def test_eleven_weights_say_what_the_formula_says(layout, activation, sigma):
    scaling = {"target_mean": [1.0, -2.0, 3.0], "target_sd": [2.0, 0.5, 1.0]}
    system, batch = make(layout=layout, activation=activation, **scaling), spots()
    assert system.n_weights == 11
    assert sum(p.numel() for p in system.parameters()) == 11 * 3 * 3
    system.chosen.copy_(torch.tensor([2, 0, 1]))
    found = answer(system, batch)
    for gene, restart in enumerate([2, 0, 1]):
        weights = {n: w.detach()[restart].double() for n, w in system.stain.named_parameters()}
        want = by_hand(weights, layout, sigma, batch.spot_tokens, gene)
        want = want * scaling["target_sd"][gene] + scaling["target_mean"][gene]
        torch.testing.assert_close(found[:, gene].double(), want, rtol=1e-5, atol=1e-6)


def test_density_is_read_as_it_is_whatever_was_fitted():
    batch = spots()
    want = answer(make(), batch)
    fitted = make(token_mean=[0.4] * 3, token_sd=[0.1] * 3)
    assert torch.equal(answer(fitted, batch), want)
    assert not NSL.config_class.standardised
    assert fitted.config.token_mean is None


def test_patches_and_their_features_give_one_answer():
    system = make()
    patch = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        kept = system.encoder(patch)
        assert kept.shape == (5, GRID**2, 3)
        torch.testing.assert_close(kept.mean(1), optical_density(patch).mean((1, 2)))
        one = system(ids=["s"] * 5, patch=patch).mean
        other = system(ids=["s"] * 5, spot_tokens=kept).mean
    assert torch.equal(one, other)


@every_layout
def test_an_answer_can_be_differentiated_by_the_pixels(layout):
    patch = torch.rand(2, 8, 8, 3) * 255
    patch.requires_grad_()
    make(layout=layout)(ids=["a", "b"], patch=patch).mean.sum().backward()
    assert patch.grad.isfinite().all()
    assert (patch.grad != 0).any(dim=(1, 2, 3)).all()


@every_layout
def test_rows_do_not_depend_on_their_batch(layout):
    system, batch = make(layout=layout), spots()
    whole = answer(system, batch)
    for row in range(6):
        alone = answer(system, unlabelled(batch, slice(row, row + 1)))
        torch.testing.assert_close(alone, whole[row : row + 1], rtol=0, atol=1e-6)


@every_layout
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_genes_at_once_change_neither_answers_nor_gradients(layout, chunk):
    batch, found = spots(genes=5), []
    for size in (32, chunk):
        system = make(genes=5, layout=layout, gene_chunk=size)
        mean = answer(system, batch)
        system.train()(**batch).loss.backward()
        found.append([mean, *(p.grad for p in system.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_dropped_background_does_not_count():
    batch = spots()
    batch.spot_tokens[:3, ::2] = 0.01
    some = Batch(ids=batch.ids[:3], spot_tokens=batch.spot_tokens[:3, 1::2])
    system = make(background="drop")
    with torch.no_grad():
        tissue = system(**some).mean
    torch.testing.assert_close(answer(system, batch)[:3], tissue)
    assert not torch.allclose(answer(make(), batch)[:3], tissue)
    torch.testing.assert_close(answer(system, batch)[3:], answer(make(), batch)[3:])


@every_layout
def test_bf16_autocast_changes_nothing(layout):
    system, batch = make(layout=layout), spots()
    want = answer(system, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = answer(system, batch)
    assert torch.equal(found, want)


# Restarts


@every_layout
def test_each_restart_learns_as_if_it_were_alone(layout):
    batch = spots()
    together = make(layout=layout)
    alone = [make(layout=layout, restarts=1) for _ in range(3)]
    with torch.no_grad():
        for number, one in enumerate(alone):
            for own, every in zip(one.parameters(), together.parameters(), strict=True):
                own.copy_(every[number : number + 1])
    fit(together, batch, 20)
    for number, one in enumerate(alone):
        fit(one, batch, 20)
        for own, every in zip(one.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(own[0], every[number], rtol=1e-4, atol=1e-5)


def test_each_gene_learns_as_if_it_were_alone():
    batch, together, alone = spots(genes=2), make(genes=2), make(genes=1)
    with torch.no_grad():
        for own, every in zip(alone.parameters(), together.parameters(), strict=True):
            own.copy_(every[:, 1:])
    fit(together, batch, 20)
    batch.target, batch.target_mask = batch.target[:, 1:], batch.target_mask[:, 1:]
    fit(alone, batch, 20)
    for own, every in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(own, every[:, 1:], rtol=1e-4, atol=1e-5)


def test_starts_differ_and_lie_around_haematoxylin_and_eosin():
    for layout in LAYOUTS:
        system = make(genes=200, layout=layout)
        vectors, _ = system.stain.stains(torch.ones(200, dtype=torch.long))
        torch.testing.assert_close(vectors.median(0).values, ruifrok()[:2], rtol=0, atol=0.05)
        assert all(len(p.flatten(1).unique(dim=0)) == 3 for p in list(system.parameters())[:2])
    assert not make().stain.intercept.any()


def test_losses_of_all_restarts_are_there():
    system, batch = make(), spots()
    with torch.no_grad():
        found = system(**batch)
        each = []
        for number in range(3):
            system.chosen.fill_(number)
            each.append(F.mse_loss(answer(system, batch), batch.target))
    assert set(found.losses) == {"expression", "restarts"}
    torch.testing.assert_close(found.losses["expression"], each[0])
    torch.testing.assert_close(found.losses["restarts"], each[1] + each[2])
    torch.testing.assert_close(found.loss, sum(each))
    assert set(make(restarts=1)(**batch).losses) == {"expression"}


def test_settling_chooses_the_restart_of_each_gene_by_validation(tmp_path):
    system, valid = make(genes=4), spots(rows=10, genes=4, seed=5)
    valid.target_mask[:4, 0] = False
    valid.target[:4, 0] = 0.0
    halves = [Batch(**{k: v[rows] for k, v in valid.items()}) for rows in (slice(4), slice(4, 10))]
    train = spots(rows=2, genes=4)
    train.spot_tokens[0, :8] = 0.01  # a quarter of the pixels
    batches = {"valid": halves, "train": [train]}
    errors = []
    for number in range(3):
        system.chosen.fill_(number)
        squared = (answer(system, valid) - valid.target).square() * valid.target_mask
        errors.append(squared.sum(0))
    with torch.no_grad():
        system.settle(batches.__getitem__)
    want = torch.stack(errors).argmin(0)
    assert system.chosen.tolist() == want.tolist()
    assert len(want.unique()) > 1
    assert system.config.background_share == pytest.approx(0.25)
    with torch.no_grad():
        system.settle(batches.__getitem__)
    assert system.chosen.tolist() == want.tolist()
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert torch.equal(answer(loaded, valid), answer(system, valid))
    assert loaded.config.background_share == pytest.approx(0.25)


def test_a_start_that_diverged_is_not_chosen():
    system, batch = make(), spots()
    with torch.no_grad():
        system.stain.weight[0] = torch.nan
        system.settle(lambda _: [batch])
    assert 0 not in system.chosen
    assert answer(system, batch).isfinite().all()


# The linear limit


def mean_squares(system, batch):
    return (answer(system, batch) - batch.target).square().mean(0)


def test_weights_that_say_the_same_as_ridge():
    batch = spots(rows=40)
    mean_od = batch.spot_tokens.mean(1)
    slope, intercept = linear_limit(mean_od, batch.target, 5.0)
    system = make(activation="identity", restarts=1)
    with torch.no_grad():
        system.stain.vectors[0, :, 0] = slope
        system.stain.offset.zero_()
        system.stain.weight[0] = torch.tensor([1.0, 0.0])
        system.stain.intercept[0] = intercept
    want = (mean_od.double() @ slope.T + intercept).float()
    torch.testing.assert_close(answer(system, batch), want)


@every_layout
def test_the_linear_limit_is_trained_to_least_squares(layout):
    batch = spots(rows=40)
    batch.target += batch.spot_tokens.mean(1) @ torch.tensor([[2.0], [-4.0], [3.0]])
    batch.target -= batch.target.mean(0)
    mean_od = batch.spot_tokens.mean(1).double()
    if layout == "v1":
        slope, intercept = linear_limit(mean_od, batch.target)
        fitted = mean_od @ slope.T + intercept
    else:  # through the origin
        fitted = mean_od @ torch.linalg.lstsq(mean_od, batch.target.double()).solution
    want = (fitted - batch.target).square().mean(0)
    system = make(layout=layout, activation="identity", restarts=1).train()
    optimiser = torch.optim.LBFGS(
        system.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def step():
        optimiser.zero_grad()
        loss = system(**batch).loss
        loss.backward()
        return loss

    optimiser.step(step)
    torch.testing.assert_close(
        mean_squares(system.eval(), batch).double(), want, rtol=0, atol=1e-4
    )


def test_pixels_say_more_than_their_mean():
    """A gene that follows the strongly stained pixels is learned, and not by the linear limit."""
    batch = spots(rows=60, genes=1)
    dark = (batch.spot_tokens @ torch.tensor([1.0, 1.0, 1.0]) - 1.8).relu().mean(1)
    batch.target = ((dark - dark.mean()) / dark.std()).unsqueeze(1)
    least = linear_limit(batch.spot_tokens.mean(1), batch.target)
    linear = (batch.spot_tokens.mean(1).double() @ least[0].T + least[1]).float()
    system = fit(make(genes=1), batch, 100, lr=1e-1)
    with torch.no_grad():
        system.settle(lambda _: [batch])
    assert mean_squares(system, batch) < 0.7 * (linear - batch.target).square().mean()


# Stains


@every_layout
def test_stains_are_tabled_with_their_colours(layout):
    system = make(layout=layout)
    with torch.no_grad():
        for p in system.parameters():
            p[1:] = torch.nan  # of the chosen restart alone
        name = "vectors" if layout == "v1" else "matrix"
        start = torch.linalg.inv(ruifrok())[:, :2].T if layout == "v1" else ruifrok()
        getattr(system.stain, name)[0] = 3 * start
        system.stain.weight[0, :, 1] = torch.tensor([5.0, 6.0, 7.0])
    table = system.stains()
    assert list(table) == [
        *("gene", "stain", "od_red", "od_green", "od_blue", "red", "green", "blue", "weight")
    ]
    assert table["gene"].tolist() == ["g0", "g0", "g1", "g1", "g2", "g2"]
    assert table["stain"].tolist() == [1, 2] * 3
    found = torch.tensor(table.filter(like="od_").to_numpy())
    torch.testing.assert_close(found, ruifrok()[:2].repeat(3, 1), rtol=1e-4, atol=1e-5)
    assert table[["red", "green", "blue"]].head(2).to_numpy().tolist() == [
        [133, 126, 192],
        [237, 95, 230],
    ]
    assert table["weight"].tolist()[1::2] == [5.0, 6.0, 7.0]


# Configurations


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "v3"}, "model.layout is 'v3'; it can be v1, v2"),
        ({"activation": "gelu"}, "model.activation is 'gelu'; it can be softplus, sigmoid, relu"),
        ({"background": "white"}, "model.background is 'white'; it can be keep, drop"),
        ({"restarts": 0}, "model.restarts is 0; it must be above 0"),
        ({"gene_chunk": 0}, "model.gene_chunk is 0; it must be above 0"),
        ({"head": {"kind": "mlp"}}, "model.head.kind is 'mlp'; with nsl it can only be identity"),
        ({"encoder": "colour"}, "model.encoder is of the kind 'colour'.*it can only be od"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(("preset", "pixels"), [("default", 784), ("small", 196)])
def test_installed_configuration(preset, pixels):
    run = load_run_config("nsl", data="data_yeast", overrides=[f"preset={preset}"])
    system = NSL(NSLConfig(**run.model, targets=["a", "b"]))
    assert system.encoder.layout == (pixels, 3)
    assert system.n_weights == 11
    assert run.train.max_grad_norm == run.train.weight_decay == 0
    assert run.train.batch_size > 1193
