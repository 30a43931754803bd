"""Token alignment against loops, and what must hold whatever the weights."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from seq2expr.errors import UserError
from seq2expr.model.alignment import Alignment, MappingKind, Prototypes, compress

# Pairwise different, so that no transposed axis goes unseen.
B, N, C, P, H, E, D, V = 4, 5, 11, 7, 2, 3, 13, 29
RANK, SUBSET = 6, 17
SIZES = {"prototypes": P, "heads": H, "head_dim": E, "rank": RANK, "subset": SUBSET}
DISTANCES = [-250.0, -120.0, 8.0, 136.0, 300.0]
MAPPINGS = get_args(MappingKind)


def table(n_words=V, width=D, *, seed=0, size=0.1):
    """Word embeddings with a mean that they share, as those of language models have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return size * (torch.randn(n_words, width, generator=generator) + 0.5 * common)


def features(*shape, seed=1):
    return torch.randn(*(shape or (B, N, C)), generator=torch.Generator().manual_seed(seed))


def make(mapping="lowrank", **settings):
    torch.manual_seed(2)
    alignment = Alignment(C, D, V, mapping=mapping, **{**SIZES, "dropout": 0.0, **settings})
    alignment.initialise(table(), seed=3)
    for name, parameter in alignment.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return alignment


def rms(values):
    return values.detach().double().square().mean().sqrt().item()


def loop_prototypes(state, mapping, words):
    """S of the method's note, from the tensors of a checkpoint, number by number."""
    if mapping == "free":
        return state["prototypes.vectors"]
    if mapping == "lowrank":
        left, right = state["prototypes.left"], state["prototypes.right"]
        mix = np.zeros((P, V))
        for p in range(P):
            for v in range(V):
                products = (left[p, r] * right[r, v] for r in range(RANK))
                mix[p, v] = sum(products) / math.sqrt(RANK * V)
    elif mapping == "vocab_subset":
        mix = state["prototypes.mix"] / math.sqrt(SUBSET)
        words = [words[row] for row in state["prototypes.rows"]]
    else:
        mix = state["prototypes.mix"] / math.sqrt(V)
    rows = np.zeros((P, D))
    for p in range(P):
        for j in range(D):
            rows[p, j] = sum(mix[p, v] * word[j] for v, word in enumerate(words))
            rows[p, j] += state["prototypes.bias"][p]
    return rows


def affine(state, name, row):
    weight = state[f"{name}.weight"]
    bias = state.get(f"{name}.bias", np.zeros(len(weight)))
    return np.array([sum(w * x for w, x in zip(out, row, strict=True)) for out in weight]) + bias


def loop_norm(row, state, settings):
    if settings.get("log1p"):
        row = np.array([math.log(1 + max(x, 0.0)) for x in row])
    if settings.get("norm") == "standard":
        return (row - state["mean"]) / state["sd"]
    variance = sum((x - row.mean()) ** 2 for x in row) / len(row)
    return (row - row.mean()) / math.sqrt(variance + 1e-5)


def loop_distance(distance, state):
    signed = math.copysign(math.log(1 + abs(distance) / 100), distance)
    hidden = affine(state, "distance.0", [signed])
    hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden]
    return affine(state, "distance.2", hidden)


def loop_align(alignment, mapping, values, words, settings):
    """The formulas of :class:`Alignment`, one bin and one head at a time."""
    state = {name: tensor.numpy() for name, tensor in alignment.state_dict().items()}
    prototypes = loop_prototypes(state, mapping, words.numpy())
    keys = [affine(state, "key", row) for row in prototypes]
    values_of = [affine(state, "value", row) for row in prototypes]
    answer = np.zeros((len(values), values.shape[1], D))
    attention = np.zeros((len(values), H, values.shape[1], P))
    for b, site in enumerate(values.numpy()):
        for n, row in enumerate(site):
            query = affine(state, "query", loop_norm(row, state, settings))
            mixed = []
            for h in range(H):
                part = slice(h * E, (h + 1) * E)
                logits = [query[part] @ key[part] / math.sqrt(E) for key in keys]
                total = sum(math.exp(logit) for logit in logits)
                for p, logit in enumerate(logits):
                    attention[b, h, n, p] = math.exp(logit) / total
                mixed.extend(sum(attention[b, h, n, p] * values_of[p][part] for p in range(P)))
            aligned = affine(state, "out", mixed)
            if "distances" in settings:
                aligned = aligned + loop_distance(settings["distances"][n], state)
            size = math.sqrt(sum(x * x for x in aligned) / D)
            answer[b, n] = state["scale"] * aligned / size
    return answer, attention


@pytest.mark.parametrize(
    ("mapping", "settings"),
    [
        ("full", {}),
        ("lowrank", {"distances": DISTANCES}),
        ("vocab_subset", {"log1p": True}),
        ("free", {"norm": "standard", "log1p": True, "distances": DISTANCES}),
    ],
)
def test_equals_loops(mapping, settings):
    alignment = make(mapping, **settings)
    if "norm" in settings:
        seen = compress(features(50, C, seed=5))
        alignment.fit_norm(seen.mean(0), seen.std(0))
    alignment = alignment.double().eval()
    values, words = features().double(), table().double()
    answer, attention = loop_align(alignment, mapping, values, words, settings)
    np.testing.assert_allclose(alignment(values, words).detach().numpy(), answer, atol=1e-6)
    np.testing.assert_allclose(alignment.weights(values, words).numpy(), attention, atol=1e-6)
    prototypes = alignment.prototypes(words)
    assert torch.equal(alignment(values, words, prototypes), alignment(values, words))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_bin_says_the_same_whatever_stands_beside_it(mapping):
    alignment, words = make(mapping).eval(), table()
    whole = alignment(features(), words)
    chosen = alignment(features()[1:3][:, [4, 0]], words)
    torch.testing.assert_close(chosen, whole[1:3][:, [4, 0]], rtol=1e-5, atol=1e-6)


def test_distances_tell_equal_bins_apart():
    alignment = make(distances=DISTANCES).eval()
    same = features(1, 1, C).expand(2, N, C)
    answer = alignment(same, table())
    torch.testing.assert_close(answer[0], answer[1])
    gaps = torch.pdist(answer[0])
    assert gaps.min() > 1e-4
    assert torch.pdist(make().eval()(same, table())[0]).max() < 1e-6


def test_the_order_of_prototypes_does_not_count():
    alignment, words = make().eval(), table()
    prototypes = alignment.prototypes(words)
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    shuffled = alignment(features(), words, prototypes[order])
    torch.testing.assert_close(shuffled, alignment(features(), words), rtol=1e-5, atol=1e-6)


def test_weights_are_shares_of_prototypes():
    alignment = make(dropout=0.5).train()
    weights = alignment.weights(features(), table())
    assert weights.shape == (B, H, N, P)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N))
    assert torch.equal(weights, alignment.weights(features(), table()))


def test_dropout_acts_in_training_only():
    alignment, words = make(dropout=0.5), table()
    one, other = (alignment.train()(features(), words) for _ in range(2))
    assert not torch.allclose(one, other)
    assert torch.equal(alignment.eval()(features(), words), alignment(features(), words))


@pytest.mark.parametrize(
    ("width", "words", "projections", "full", "lowrank"),
    [  # the table of the method's note, in millions
        (576, 49_152, 4.9, 49.2, 3.2),
        (768, 50_257, 5.5, 50.3, 3.3),
        (1024, 50_304, 6.3, 50.3, 3.3),
        (896, 151_936, 5.9, 151.9, 9.8),
        (1024, 151_936, 6.3, 151.9, 9.8),
        (2048, 128_256, 9.4, 128.3, 8.3),
    ],
    ids=["SmolLM2-135M", "GPT-2", "Pythia-410m", "Qwen2.5-0.5B", "Qwen3-0.6B", "Llama-3.2-1B"],
)
def test_sizes_for_known_language_models(width, words, projections, full, lowrank):
    def millions(module):
        return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)

    counts = {}
    for mapping in MAPPINGS:
        with torch.device("meta"):
            alignment = Alignment(3072, width, words, mapping=mapping, distances=[0.0])
        layers = nn.ModuleList([alignment.query, alignment.key, alignment.value, alignment.out])
        assert millions(layers) == projections
        counts[mapping] = millions(alignment.prototypes)
        assert {tensor.device.type for tensor in alignment.state_dict().values()} == {"meta"}
    free = round(width * 1000 / 1e6, 1)
    assert counts == {"full": full, "lowrank": lowrank, "vocab_subset": 1.0, "free": free}


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_model_built_on_meta_is_the_checkpoint_it_loads(mapping):
    settings = {"norm": "standard", "distances": DISTANCES}
    alignment = make(mapping, **settings).eval()
    alignment.fit_norm(features().mean((0, 1)), features().std((0, 1)))
    with torch.device("meta"):
        loaded = Alignment(C, D, V, mapping=mapping, **SIZES, **settings)
    loaded.load_state_dict(alignment.state_dict(), assign=True)
    loaded.eval()
    assert torch.equal(loaded(features(), table()), alignment(features(), table()))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_arithmetic_is_float32_under_bf16_autocast(mapping):
    alignment, words = make(mapping, distances=DISTANCES).eval(), table().bfloat16()
    values = features().half()
    outside = alignment(values, words)
    with torch.autocast("cpu", torch.bfloat16):
        prototypes = alignment.prototypes(words)
        inside, weights = alignment(values, words), alignment.weights(values, words)
    assert {v.dtype for v in (prototypes, inside, weights)} == {torch.float32}
    assert torch.equal(inside, outside)
    torch.testing.assert_close(
        inside, alignment(values.float(), words.float()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_parameter_learns(mapping):
    alignment, words = make(mapping, distances=DISTANCES, dropout=0.1).train(), table()
    values = features().requires_grad_()
    answer = alignment(values, words)
    (answer * torch.randn_like(answer)).sum().backward()
    for name, parameter in [*alignment.named_parameters(), ("features", values)]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
    assert words.grad is None


def test_reused_prototypes_give_the_same_gradient():
    alignment, words = make().eval(), table()
    alignment(features(), words).square().sum().backward()
    want = {name: p.grad.clone() for name, p in alignment.named_parameters()}
    alignment.zero_grad()
    prototypes = alignment.prototypes(words)
    leaf = prototypes.detach().requires_grad_()
    for row in features().split(1):
        alignment(row, words, leaf).square().sum().backward()
    prototypes.backward(leaf.grad)
    for name, parameter in alignment.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("size", [0.02, 3.0])
def test_initialise_fits_the_size_of_the_words(mapping, size):
    words = table(2000, 48, size=size)
    torch.manual_seed(0)
    sizes = {"prototypes": 100, "heads": 4, "head_dim": 16, "rank": 64, "subset": 500}
    alignment = Alignment(96, 48, 2000, mapping=mapping, **sizes, distances=range(-600, 600, 100))
    alignment.eval()
    for _ in range(2):  # a second time changes nothing
        alignment.initialise(words, seed=0)
        assert alignment.scale.item() == pytest.approx(rms(words), rel=1e-6)
    values = features(8, 12, 96)
    answer = alignment(values, words)
    assert rms(answer) == pytest.approx(rms(words), rel=1e-4)
    between = answer - answer.mean(0)
    assert rms(between) > 0.3 * rms(words)  # what one bin says, not only where it lies
    prototypes = alignment.prototypes(words)
    assert rms(alignment.value(prototypes)) == pytest.approx(1, rel=0.1)
    assert alignment.value(prototypes).mean(0).abs().max() < 1e-4
    logits = alignment.weights(values, words).log()
    assert rms(logits - logits.mean(-1, keepdim=True)) == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize("mapping", ["full", "lowrank", "vocab_subset"])
def test_prototypes_start_at_the_size_of_the_words(mapping):
    torch.manual_seed(0)
    words = table(3000, 40, size=0.07)
    prototypes = Prototypes(3000, 40, count=400, mapping=mapping, rank=64, subset=900)
    assert rms(prototypes(words)) == pytest.approx(rms(words), rel=0.1)


@pytest.mark.parametrize("mapping", ["full", "lowrank"])
def test_a_step_of_adam_moves_prototypes_a_little(mapping):
    torch.manual_seed(0)
    words = torch.randn(49_152, 20)
    prototypes = Prototypes(49_152, 20, count=30, mapping=mapping)
    before = prototypes(words)
    optimizer = torch.optim.AdamW(prototypes.parameters(), lr=3e-4)
    (before * torch.randn_like(before)).sum().backward()
    optimizer.step()
    assert 1e-3 < rms(prototypes(words) - before) / rms(before) < 0.03


def spread(words, centres):
    """Mean squared distance of words to the nearest centre."""
    return torch.cdist(words, centres.detach()).min(1).values.square().mean().item()


def test_centroids_stand_for_the_words():
    words = features(40, 16, seed=0).repeat_interleave(50, dim=0) + 0.1 * features(2000, 16)
    by_chance = spread(words, words[torch.randperm(2000)[:60]])
    subset = Prototypes(2000, 16, count=3, mapping="vocab_subset", subset=60)
    assert subset.rows.tolist() == list(range(60))
    subset.initialise(words, seed=1)
    rows = subset.rows.tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 60
    assert spread(words, words[rows]) < 0.7 * by_chance
    free = Prototypes(2000, 16, count=60, mapping="free")
    free.initialise(words, seed=1)
    assert spread(words, free(words)) < spread(words, words[rows])
    subset.initialise(words, seed=1)
    assert subset.rows.tolist() == rows
    subset.initialise(words, seed=2)
    assert subset.rows.tolist() != rows


def test_words_that_are_alike_still_fill_the_subset():
    words = torch.ones(40, D)
    words[:3] = table(3)
    prototypes = Prototypes(40, D, count=P, mapping="vocab_subset", subset=10)
    prototypes.initialise(words, seed=0)
    assert len(set(prototypes.rows.tolist())) == 10


def test_words_can_be_given():
    prototypes = Prototypes(V, D, count=P, mapping="vocab_subset", subset=3)
    prototypes.initialise(table(), 0, rows=[20, 4, 7])
    assert prototypes.rows.tolist() == [20, 4, 7]
    changed = table()
    changed[[i for i in range(V) if i not in (4, 7, 20)]] = 0
    assert torch.equal(prototypes(changed), prototypes(table()))
    for rows, says in (([1, 2], "has 2 words"), ([1, 1, 2], "2 are diff"), ([1, 2, V], "0 to 28")):
        with pytest.raises(UserError, match=says):
            prototypes.initialise(table(), 0, rows=rows)
    with pytest.raises(UserError, match="needs mapping: vocab_subset, not full"):
        make("full").initialise(table(), 0, rows=[1, 2, 3])


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_a_checkpoint_does_not_hold_the_table(mapping):
    alignment = make(mapping)
    words = table()
    alignment(features(), words)
    for tensor in [*alignment.state_dict().values(), *alignment.buffers()]:
        assert tensor.shape != words.shape
    assert set(dict(alignment.named_buffers())) <= set(alignment.state_dict())


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_is_kept_for_the_backward_pass(mapping):
    batch, bins, count, n_words = 6, 50, 40, 3000
    alignment = Alignment(
        C, D, n_words, mapping=mapping, **{**SIZES, "prototypes": count}, dropout=0.0
    )
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, id)
    with hooks:
        alignment(features(batch, bins, C), table(n_words))
    assert kept
    for shape in kept:
        assert math.prod(shape) < batch * H * bins * count or shape == (n_words, D)
        assert not {n_words, batch * bins} <= set(shape)
    assert ((n_words, D) in kept) == (mapping in {"full", "lowrank"})


def test_a_channel_without_spread_is_only_centred():
    alignment = make(norm="standard").eval()
    values = features()
    values[..., 3] = 5.0
    alignment.fit_norm(values.mean((0, 1)), values.std((0, 1)))
    answer = alignment(values, table())
    assert answer.isfinite().all()
    zero = torch.zeros(B, N, C)
    torch.testing.assert_close(alignment._normalise(values)[..., 3], zero[..., 3])


def test_compress_is_the_log_of_what_is_above_zero():
    values = torch.tensor([-3.0, -0.1, 0.0, 1.0, 99.0])
    want = torch.tensor([0.0, 0.0, 0.0, math.log(2), math.log(100)])
    torch.testing.assert_close(compress(values), want)


def test_no_name_ends_as_the_parts_that_an_adapter_carries_whole():
    alignment = make(distances=DISTANCES, norm="standard")
    for name, _ in alignment.named_modules():
        assert not name.endswith(("head", "align", "readout", "last"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mapping": "dense"}, "mapping is 'dense'; it can be full, lowrank, vocab_subset, free"),
        ({"norm": "batch"}, "norm is 'batch'; it can be layer, standard"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"prototypes": 1}, "prototypes is 1; it must be at least 2"),
        ({"dropout": 1.0}, "dropout is 1.0; it can be from 0 to below 1"),
        ({"mapping": "free", "prototypes": 30}, "prototypes is 30, but .* 29 words"),
        ({"mapping": "vocab_subset", "subset": 30}, "subset is 30, but .* 29 words"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(UserError, match=says):
        Alignment(C, D, V, **{**SIZES, **settings})


def test_inputs_of_another_model_are_refused():
    alignment = make(distances=DISTANCES)
    with pytest.raises(UserError, match=r"table is \[29, 12\].* made for \[29, 13\]"):
        alignment(features(), table(width=12))
    with pytest.raises(UserError, match="4 bins of 11 channels; the model was made for 5 of 11"):
        alignment(features()[:, :4], table())
    with pytest.raises(UserError, match="5 bins of 10 channels"):
        alignment(features()[..., :10], table())
