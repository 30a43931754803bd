"""The panel and the genes beside it: weights, how they are learned, and what is kept."""

import logging

import pytest
import torch
from torch import Tensor

from seq2expr.config import load_run_config
from seq2expr.errors import UserError
from seq2expr.model.batch import Batch
from seq2expr.model.soft_topk import soft_weights
from seq2expr.model.system import System, check_settings
from seq2expr.systems.agl import AGL, AGLConfig
from seq2expr.systems.triplex import Triplex

PANEL, OTHERS, PX = ["p0", "p1"], ["a0", "a1", "a2", "a3"], 32
SIZES = {"depth": 1, "heads": 2, "mlp_ratio": 1, "dropout": 0.3}
INNER = {"width": 8, "fusion": SIZES, "use_window": False, "use_slide": False}
LAST = {
    "targets": PANEL,
    "target_mean": [0.5, -1.0],
    "target_sd": [1.5, 0.7],
    "auxiliary": OTHERS,
    "auxiliary_mean": [1.0, 0.0, 0.2, 0.0],
    "auxiliary_sd": [0.6, 2.0, 1.0, 1.0],
}
USUAL = {
    "encoder": {"kind": "colour", "grid": 2},
    "patch_px": PX,
    "inner": INNER,
    "head": {"kind": "linear", "loss": "mse"},
    "temperature": 0.2,
}


def configure(**settings) -> AGLConfig:
    return AGLConfig(**LAST | USUAL | settings)


def make(*, seed: int = 0, **settings) -> AGL:
    torch.manual_seed(seed)
    return AGL(configure(**settings)).eval()


def spots(rows: int = 8, *, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    auxiliary = torch.randn(rows, len(OTHERS), generator=draw)
    auxiliary[torch.rand(rows, len(OTHERS), generator=draw) < 0.2] = torch.nan
    return Batch(
        ids=[str(row) for row in range(rows)],
        patch=torch.randint(0, 256, (rows, PX, PX, 3), generator=draw, dtype=torch.uint8),
        target=torch.randn(rows, len(PANEL), generator=draw),
        target_mask=torch.rand(rows, len(PANEL), generator=draw) < 0.9,
        auxiliary=auxiliary,
        slide=torch.arange(rows) % 2,
    )


def without(batch: Batch, *names: str) -> Batch:
    return Batch(**{name: value for name, value in batch.items() if name not in names})


def batches(part: str):
    first = {"train": 10, "valid": 20}[part]
    return iter([spots(seed=first), spots(seed=first + 1), spots(3, seed=first + 2)])


def answer(system, batch: Batch) -> Tensor:
    with torch.no_grad():
        return system(**batch).mean


def lambdas(k: float) -> list[float]:
    return [1.0, 1.0, *soft_weights(len(OTHERS), torch.tensor(k), 0.2).tolist()]


# ---------------------------------------------------------------- the panel and the others


def test_primary_is_the_wrapped_system_on_the_panel_and_nothing_else():
    system = make(k="primary")
    torch.manual_seed(0)
    fitted = {key: value for key, value in LAST.items() if "auxiliary" not in key}
    shared = {key: USUAL[key] for key in ("encoder", "patch_px", "head")}
    alone = Triplex(type(system.core.config)(**fitted, **shared, **INNER)).eval()
    batch = spots()
    assert system.head.net.out_features == len(PANEL)
    assert torch.equal(answer(system, batch), answer(alone, without(batch, "auxiliary")))
    assert sum(p.numel() for p in system.parameters()) == sum(
        p.numel() for p in alone.parameters()
    )
    for model in (system.train(), alone.train()):
        torch.manual_seed(1)
        model(**without(batch, "auxiliary")).loss.backward()
    for own, other in zip(system.parameters(), alone.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize(
    ("k", "expected"), [("learned", 0.5), (0.3, 0.3), (0, 0.0), ("all", None)]
)
def test_training_weighs_the_cells_of_all_genes(k, expected):
    system, batch = make(k=k), spots()
    system.train()
    for module in system.modules():  # so that the answer is the same twice
        module.training = False if isinstance(module, torch.nn.Dropout) else module.training
    weights = lambdas(expected) if expected is not None else [1.0] * 6
    mean = system.core(**without(batch, "auxiliary", "target", "target_mask")).mean
    head = system.head
    above = below = 0.0
    for row in range(8):
        for gene, weight in enumerate(weights):
            if gene < len(PANEL):
                label, known = batch.target[row, gene], batch.target_mask[row, gene]
            else:
                label = batch.auxiliary[row, gene - len(PANEL)]
                known = not label.isnan()
            if known:
                above += weight * ((mean[row, gene] - label) / head.sd[gene]).square().item()
                below += weight
    assert system(**batch).losses["expression"].item() == pytest.approx(above / below, rel=1e-5)


def test_evaluation_asks_nothing_of_the_others():
    system, batch = make(), spots()
    found = system(**batch)
    blind = system(**without(batch, "auxiliary"))
    assert found.mean.shape == (8, len(PANEL))
    assert found.loss == blind.loss
    want = ((found.mean - batch.target) / system.head.sd[:2]).square()[batch.target_mask].mean()
    torch.testing.assert_close(found.losses["expression"], want.detach())


def test_every_head_has_the_weights():
    system = make(k=0.3)
    heads = [system.head, *system.core.branch_heads.values()]
    assert len(heads) == 2
    for head in heads:
        torch.testing.assert_close(head.weights, torch.tensor(lambdas(0.3)))
        assert head.mean.tolist() == pytest.approx([*LAST["target_mean"], *LAST["auxiliary_mean"]])


def test_only_the_first_ranks_are_used():
    system = make(auxiliary_genes=3, k="all")
    assert system.head.net.out_features == len(PANEL) + 3
    assert system.train()(**spots()).loss.isfinite()


def test_training_without_the_others_is_refused():
    system = make().train()
    with pytest.raises(UserError, match="on 4 genes outside the panel, and the batch has none"):
        system(**without(spots(), "auxiliary"))
    batch = spots()
    batch.auxiliary = batch.auxiliary[:, :3]
    with pytest.raises(UserError, match="labels of 3 auxiliary genes, and the model knows 4"):
        system(**batch)


def test_a_correlation_is_selected_by_the_loss():
    pearson = make(head={"kind": "linear", "loss": "pearson"})
    assert (make().selects, pearson.selects) == ("mse", "loss")


# ---------------------------------------------------------------- how k is learned


def test_the_ways_to_the_derivative_agree():
    found = {}
    for name in ("vjp", "jvp", "unrolled"):
        system = make(hypergradient=name, inner_rate=0.1).train()
        found[name] = system.hypergradient(spots(seed=1), spots(seed=2)).item()
        assert system.training
        assert system.core.training
    assert found["jvp"] == pytest.approx(found["vjp"], rel=1e-4)
    assert found["unrolled"] == pytest.approx(found["vjp"], rel=1e-4)


def test_the_derivative_is_that_of_a_step_and_its_validation():
    system = make(inner_rate=0.5)
    train, valid = spots(64, seed=1), without(spots(64, seed=2), "auxiliary")
    found = system.hypergradient(train, valid).item()
    labels = torch.cat([train.target, train.auxiliary.nan_to_num()], dim=1)
    known = torch.cat([train.target_mask, ~train.auxiliary.isnan()], dim=1)
    total = (torch.tensor(lambdas(0.5)) * known.sum(0)).sum()
    double = system.core.double()

    def after(k: float) -> float:
        state = {name: value.clone() for name, value in double.state_dict().items()}
        weights = torch.tensor(lambdas(k))
        double.head.weights.copy_(weights)
        fields = without(train, "auxiliary", "target", "target_mask")
        answer = double(**fields, target=labels, target_mask=known)
        # The system divides by its own sum of weights; the one at 0.5 is meant.
        loss = answer.loss * (weights * known.sum(0)).sum() / total
        for parameter, slope in zip(
            double.parameters(), torch.autograd.grad(loss, list(double.parameters())), strict=True
        ):
            parameter.data -= 0.5 * slope
        residual = (answer_of(double, valid)[:, :2] - valid.target) / double.head.sd[:2]
        double.load_state_dict(state)
        return residual.square()[valid.target_mask].mean().item()

    def answer_of(model, batch):
        return answer(model, without(batch, "target", "target_mask"))

    assert found == pytest.approx((after(0.55) - after(0.45)) / 0.1, rel=0.02)


def test_k_moves_before_every_epoch_but_the_first():
    system = make(k_rate=0.05).train()
    before = {name: value.clone() for name, value in system.named_parameters()}
    state = torch.random.get_rng_state()
    system.between(0, batches)
    assert system.threshold.k == 0.5
    slope = system.hypergradient(spots(seed=10), spots(seed=20))
    one = make(k_rate=0.05, outer_batches=1).train()
    one.between(1, batches)
    assert one.threshold.k.item() == pytest.approx(0.5 - 0.05 * slope.sign().item(), abs=1e-4)
    system.between(1, batches)
    system.between(2, batches)
    assert system.threshold.steps == 6  # three training batches each
    assert system.trace[:4].tolist() == [-1, *system.trace[1:3].tolist(), -1]
    assert system.trace[2] == system.threshold.rank
    torch.testing.assert_close(
        system.head.weights, torch.tensor(lambdas(system.threshold.k.item()))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in system.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_a_resumed_training_learns_the_same_k():
    whole, first, second = (make() for _ in range(3))
    whole.between(1, batches)
    whole.between(2, batches)
    first.between(1, batches)
    second.load_state_dict(first.state_dict())
    second.between(2, batches)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_one_step_of_adam_is_named_for_what_it_is(caplog):
    system = make(inner_optimiser="adam", inner_rate=3e-5)
    with caplog.at_level(logging.INFO):
        system.between(1, batches)
    assert "mean gradient" in caplog.text
    assert "all but vanishes: one step of adam is its rate times a sign" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make().between(1, batches)
    assert "mean gradient" in caplog.text
    assert "adam" not in caplog.text


# ---------------------------------------------------------------- a grid instead


def test_copies_are_trained_as_each_would_be_alone():
    inner = INNER | {"fusion": SIZES | {"dropout": 0.0}}
    together = make(k="grid", grid=[0.1, 0.8], inner=inner).train()
    alone = [make(k=k, inner=inner).train() for k in (0.1, 0.8)]
    for system in (together, *alone):
        optimiser = torch.optim.SGD(system.parameters(), lr=0.1)
        for step in range(3):
            optimiser.zero_grad()
            system(**spots(seed=step)).loss.backward()
            optimiser.step()
    for grown, single in zip(together.copies, alone, strict=True):
        for own, other in zip(grown.parameters(), single.core.parameters(), strict=True):
            torch.testing.assert_close(own, other)


def test_the_copy_with_the_best_validation_is_kept(tmp_path):
    system = make(k="grid", grid=[0.0, 0.25, 1.0])
    for number, copy in enumerate(system.copies):  # the second one knows the level of the panel
        copy.head.net.weight.data *= 0.1
        level = 0.0 if number == 1 else 5.0
        copy.head.net.bias.data[:2] = (level - copy.head.mean[:2]) / copy.head.sd[:2]
    best = system.copies[1]
    expected = answer(best, without(spots(), "auxiliary", "target", "target_mask"))[:, :2]
    assert not torch.equal(answer(system, spots()), expected)
    system.train().between(1, batches)
    assert torch.equal(answer(system.eval(), spots()), expected)  # it leads already
    with torch.no_grad():
        system.settle(batches)
    assert list(system.copies) == [best]
    assert (system.config.k, system.config.k_found) == ("grid", 0.25)
    torch.testing.assert_close(answer(system, spots()), expected)
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert len(loaded.copies) == 1
    assert torch.equal(answer(loaded, spots()), answer(system, spots()))


def test_members_of_a_run_do_not_find_the_k_of_another():
    config = configure(k="grid")
    first = AGL(config).eval()
    with torch.no_grad():
        first.settle(batches)
    assert first.config.k_found is not None
    assert config.k_found is None
    assert len(AGL(config).copies) == 7


def test_copies_share_an_encoder_that_is_not_trained():
    frozen = make(k="grid")
    assert {id(copy.encoder) for copy in frozen.copies} == {id(frozen.encoder)}
    trained = make(k="grid", encoder={"kind": "cnn", "px": 32, "channels": [8], "pool": "mean"})
    assert len({id(copy.encoder) for copy in trained.copies}) == 7


# ---------------------------------------------------------------- what is kept, and refused


@pytest.mark.parametrize("head", [{"kind": "linear"}, {"kind": "mlp", "hidden": 6, "depth": 1}])
def test_the_panel_and_what_was_learned_are_kept(tmp_path, head):
    system = make(head=head)
    for epoch in (1, 2, 3):
        system.between(epoch, batches)
    ranks, found = system.trace[1:4].tolist(), system.threshold.k.item()
    before = answer(system, spots())
    with torch.no_grad():
        system.settle(batches)
    torch.testing.assert_close(answer(system, spots()), before)
    assert system.config.targets == system.core.config.targets == PANEL
    for kept in (system.head, *system.core.branch_heads.values()):
        assert kept.mean.tolist() == LAST["target_mean"]
        assert kept.weights.tolist() == [1.0, 1.0]
    system.save_pretrained(tmp_path)
    loaded = System.from_pretrained(tmp_path).eval()
    assert (loaded.config.k_found, loaded.config.k_history) == (pytest.approx(found), ranks)
    assert loaded.config.auxiliary == OTHERS
    assert torch.equal(answer(loaded, spots()), answer(system, spots()))
    assert loaded.train()(**without(spots(), "auxiliary")).loss.isfinite()  # to be fine-tuned


def test_an_unfinished_training_is_resumed_from_its_checkpoint(tmp_path):
    for settings in ({}, {"k": "grid"}, {"k": 0.3}):
        system = make(**settings).train()
        system.between(1, batches)
        system.save_pretrained(tmp_path)
        loaded = System.from_pretrained(tmp_path)
        state = loaded.state_dict()
        assert state.keys() == system.state_dict().keys()
        for name, value in system.state_dict().items():
            assert torch.equal(value, state[name])


def test_what_is_fitted_for_the_wrapped_system_reaches_it():
    inner = {"width": 8, "fusion": SIZES, "slide": SIZES, "window": SIZES}
    inner["context_encoder"] = "colour"
    system = make(inner=inner, token_mean=[3.0] * 15, token_sd=[2.0] * 15, context_mean=[1.0] * 15)
    assert system.needs == ("patch", "window_tokens", "slide_tokens")
    assert system.config.sight.context_encoder["kind"] == "colour"
    assert system.core.token_mean.tolist() == [3.0] * 15
    assert system.core.context_mean.tolist() == [1.0] * 15
    again = AGLConfig.from_dict(system.config.to_dict())
    assert again.sight.context_mean == [1.0] * 15
    assert system.example(3, torch.Generator()).window_tokens.shape == (3, 25, 15)


@pytest.mark.parametrize("preset", ["small", "faithful", "published", "grid", "all", "primary"])
def test_presets_build_what_they_name(preset):
    settings = load_run_config("agl", data="data_mob", overrides=[f"preset={preset}"]).model
    check_settings(AGLConfig, settings)
    config = AGL(AGLConfig(**settings, **LAST)).config
    if preset in ("faithful", "published"):
        steps = (config.inner_optimiser, config.unroll, config.hypergradient)
        assert steps == ("adam", 2, "unrolled")
        assert (config.inner_rate, config.k_rate, config.temperature) == (3e-5, 3e-3, 0.01)
        assert config.head["loss"] == "pearson"
        assert config.reads == ("patch",)
    assert config.k == (preset if preset in ("grid", "all", "primary") else "learned")
    assert config.encoder["kind"] == ("resnet18" if preset == "published" else "texture")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wraps": "agl"}, "model.wraps is 'agl'; it can be an image system that wraps no other"),
        ({"wraps": "seq2exp"}, "model.wraps is 'seq2exp'; it can be an image system"),
        ({"wraps": "hescape"}, "'hescape', which pairs a patch with the expression"),
        ({"wraps": "nsl", "inner": {}, "head": None, "encoder": "od"}, "genes share no weights"),
        ({"wraps": "stem", "inner": {}, "head": None}, "'stem', which draws all genes"),
        ({"inner": {"widht": 3}}, "settings of triplex: Unknown key 'model.widht'"),
        ({"inner": {"encoder": "od"}}, "model.inner.encoder is set; set model.encoder"),
        ({"k": "some"}, "model.k is 'some'; it can be learned, all, primary, grid, or a number"),
        ({"k": 1.5}, "model.k is 1.5"),
        ({"k": True}, "model.k is True"),
        ({"grid": [0.5, 2]}, r"model.grid is \[0.5, 2\]; give 0 to 1"),
        ({"hypergradient": "forward"}, "model.hypergradient is 'forward'; it can be vjp, jvp"),
        ({"unroll": 2}, "model.unroll is 2; vjp is of one step"),
        ({"temperature": 0}, "model.temperature is 0; it must be above 0"),
        ({"outer_batches": 0}, "model.outer_batches is 0; it must be at least 1"),
        ({"auxiliary": []}, "genes outside the panel, and there are none"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)
