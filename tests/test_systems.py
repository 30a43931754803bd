"""What every system promises, whatever it is: one suite over the registry."""

import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.pytorch_utils import Conv1D

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Prediction, taken
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.system import Ensemble, System, check_settings, system_class
from seq2expr.registry import BACKBONES, SYSTEMS
from tests.toy import TARGETS, WIDTH, toy_batch, toy_batch_for, toy_spots, toy_system

MASKS = [
    *({"mask": mask} for mask in ("soft", "hard", "none", "promoter")),
    {"mask": "soft", "pool": "attention"},
    {"mask": "soft", "profiles": ["guanines"], "profile_weight": 0.1},
]
_SPOT = {"width": 8, "fusion": {"heads": 2}, "use_window": False, "use_slide": False}
VARIANTS = {
    "seq2exp": [
        *({"backbone": entry.name} | mask for entry in BACKBONES for mask in MASKS),
        {"backbone": "bimamba", "mask": "hard", "pack": True},
        # The published hard variant is left out: its rows depend on their batch (a documented
        # defect, see tests/systems/test_seq2exp.py).
        {"backbone": "bimamba", "mask": "soft", "faithful": True},
    ],
    "gta": [
        {"language": "llama"},
        {"language": "gpt2", "mapping": "full", "readout": "flatten", "norm": "standard"},
        {"language": "qwen3", "mapping": "free", "readout": "last", "distance": False},
        {"llm_dtype": "bfloat16", "llm_layers": 2, "mapping": "vocab_subset", "log1p": True},
        {"llm_weights": "random", "readout": "centre", "shortcut": False},
        {"body": "attention", "readout": "attnpool"},
        {"body": "none"},
        {"prompt": {"mode": "none"}},
        {"bins": False},
    ],
    "nsl": [
        {"layout": "v1"},
        {"layout": "v2", "background": "drop", "gene_chunk": 1},
        {"activation": "identity", "restarts": 1},
    ],
    "mclstexp": [
        {"mode": "fixed"},
        {"mode": "faithful", "position_rows": 64},
        {"attention": "none", "soft_targets": True, "dropout": 0.0},
        {"position": "sinusoid", "encoder": {"kind": "colour", "what": "colour15"}},
        {"encoder": "vit", "head_gradient": True},
    ],
    "hescape": [
        {"gene_encoder": "mlp"},
        {"gene_encoder": "linear", "image_head": "linear", "loss": "siglip"},
        {"gene_encoder": "pca", "answer": "ridge", "encoder": "texture"},
        {"encoder": "vit", "head_gradient": True},
    ],
    "comtip": [
        {"genes_per_text": 2},
        {"pairs": "discriminator", "answer": "knn"},
        {"mask_target": "encoder", "mask_ratio": 0.25, "text": "none", "pairs": "none"},
        {"encoder": "vit", "head_gradient": True, "mask_weight": 0.0},
    ],
    "stem": [
        {"prediction": "v"},
        {"prediction": "epsilon", "variance": "learned", "scale_targets": False},
        {"prediction": "x0", "condition_dropout": 0.5, "guidance": 1.5, "point": "median"},
        {"objective": "regression", "encoder": "vit"},
    ],
    "triplex": [
        {"distil": 0.3},
        {"use_slide": False, "scale_targets": False},
        {"use_window": False, "context_encoder": {"kind": "colour", "what": "colour15"}},
        {"use_window": False, "use_slide": False, "encoder": "vit"},
    ],
    "bg_triplex": [
        {"guidance": "both"},
        {"guidance": "edge", "loss_mode": "triplex3", "share_guidance": False},
        {"guidance": "nuclei", "nuclei": "both", "loss_mode": "released", "boundary_chunk": 3},
        {"use_window": False, "use_slide": False, "signed_maps": True, "encoder": "vit"},
    ],
    "dkan": [
        {"kv": "pooled"},
        {"kv": "tokens", "contrast_genes": 1, "symmetric": True},
        {"path": "film", "contrast": "spots", "use_slide": False},
        {"path": "bilinear", "contrast": "genes", "text": "none", "use_window": False},
    ],
    "agl": [
        {"k": "learned"},
        {"k": "grid", "grid": [0.1, 0.9]},
        {"k": "primary"},
        {"k": 0.4, "inner": _SPOT, "encoder": "vit"},
    ],
}
IMAGE = ("nsl", "mclstexp", "hescape", "comtip", "stem", "triplex", "bg_triplex", "dkan", "agl")
SCALES = ("triplex", "bg_triplex", "dkan", "agl")
"""Those around the trunk of TRIPLEX."""
CASES = [{"name": name, **settings} for name in VARIANTS for settings in VARIANTS[name]]
ANSWERS = ("mean", "importance", "attention", "profile", "other")
ONLY_TOY = ("name", "language", "encoder", "context_encoder")
"""Keys of a case that are no settings of its system."""
SLOW = [case for case in CASES if case.get("backbone") == "bimamba" and "pack" not in case]
WRONG = {
    "seq2exp": ({"backbone": "cnn"}, "Unknown backbone 'cnn'; there are conv, bimamba"),
    "gta": ({"body": "cnn"}, "model.body is 'cnn'; it can be llm, attention, none"),
    "nsl": ({"layout": "v3"}, "model.layout is 'v3'; it can be v1, v2"),
    "mclstexp": ({"mode": "new"}, "model.mode is 'new'; it can be fixed, faithful"),
    "comtip": ({"pairs": "all"}, "model.pairs is 'all'; it can be negative, discriminator"),
    "hescape": ({"loss": "cnn"}, "model.loss is 'cnn'; it can be clip, siglip"),
    "dkan": ({"kv": "all"}, "model.kv is 'all'; it can be pooled, tokens"),
    "agl": ({"wraps": "hescape"}, "model.wraps is 'hescape', which pairs a patch"),
    "stem": ({"sampler": "x"}, "model.sampler is 'x'; it can be ancestral, ddim, multistep"),
    "triplex": ({"distil": 2}, "model.distil is 2; it must be from 0 to 1"),
    "bg_triplex": (
        {"guidance": "x"},
        "model.guidance is 'x'; it can be both, edge, nuclei, none",
    ),
}
NOT_SETTINGS = {
    "seq2exp": ("witdh", "target_mean", "hidden_size"),
    "gta": ("centr", "target_mean", "hidden_size", "width", "llm_table"),
    "nsl": ("grids", "target_mean", "token_mean"),
    "mclstexp": ("modus", "expression_mean", "n_keys"),
    "hescape": ("los", "panel", "n_keys"),
    "comtip": ("mask", "gene_vectors", "n_keys"),
    "dkan": ("texts", "gene_vectors", "text_dim"),
    "agl": ("wrap", "auxiliary", "k_found"),
    "stem": ("sample", "token_mean", "seed"),
    "triplex": ("windows", "context_mean", "token_sd"),
    "bg_triplex": ("boundary", "boundary_scale", "guides"),
}


def label(case):
    named = {key: value for key, value in case.items() if not isinstance(value, str | dict)}
    words = [str(value) for value in case.values() if isinstance(value, str)]
    words += [f"{key}={value}" if value is False else key for key, value in named.items()]
    words += [f"{key}={v}" for key, d in case.items() if isinstance(d, dict) for v in d.values()]
    return "-".join(words)


def is_drawn(case) -> bool:
    """Whether training draws numbers: a random mask, or dropout in what reads the trunk."""
    if case["name"] == "seq2exp":
        return case["mask"] not in ("none", "promoter")
    if case["name"] in IMAGE:
        parts = toy_system(**case).modules()
        return (
            case["name"] == "comtip"
            or supervised(case) == "diffusion"
            or "contrast_genes" in case
            or any(isinstance(part, nn.Dropout) and part.p > 0 for part in parts)
        )
    return case.get("body") != "none" and case.get("bins", True)


def supervised(case) -> str:
    """Name of the loss that targets make."""
    draws = case["name"] == "stem" and case.get("objective") != "regression"
    return "diffusion" if draws else "expression"


def reads(case) -> tuple[str, ...]:
    """Fields of a batch that a system needs."""
    if case["name"] == "seq2exp":
        return ("codes", "signal", "features")
    if case["name"] in SCALES:
        case = case | case.get("inner", {})
        parts = {"window_tokens": "use_window", "slide_tokens": "use_slide"}
        maps = ("boundary", "window_boundary")[: 1 + case.get("use_window", True)]
        scales = [name for name, part in parts.items() if case.get(part, True)]
        return ("patch", *scales, *(maps if case["name"] == "bg_triplex" else ()))
    if case["name"] in IMAGE:
        return ("patch",)
    window = ("codes", "signal") if case.get("bins", True) else ()
    text = () if case.get("body") == "none" or "prompt" in case else ("text",)
    return (*window, *text, "features")


every_system = pytest.mark.parametrize("case", CASES, ids=label)
every_name = pytest.mark.parametrize("name", VARIANTS)


def test_every_system_of_the_registry_is_here():
    assert {entry.name for entry in SYSTEMS} <= VARIANTS.keys()


def batch_for(system: System, rows: int = 4, seed: int = 0) -> Batch:
    batch = toy_batch_for(system, rows, seed=seed)
    if getattr(system.config, "profiles", None):
        batch.profile = (batch.codes == 2).half().unsqueeze(1)
        batch.profile_scale = torch.tensor([2.0])
    return batch


def chosen(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, in this order."""
    return Batch(**taken(batch, rows))


def answers(system, batch: Batch) -> Prediction:
    with torch.no_grad():
        return system(**batch)


def assert_same(one: Prediction, other: Prediction, **tolerance: float) -> None:
    for name in ANSWERS:
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        if isinstance(first, dict):
            assert first.keys() == second.keys()
        if first is not None:
            torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0, "atol": 0}))


def take(answer: Prediction, rows: list[int]) -> Prediction:
    fields = {name: answer[name] for name in ANSWERS if name in answer}
    other = {key: value[rows] for key, value in fields.pop("other", {}).items()}
    return Prediction(**{name: v[rows] for name, v in fields.items()}, other=other or None)


# Answers


@every_system
def test_answer_has_the_documented_shape(case):
    system = toy_system(**case)
    answer = answers(system, batch_for(system))
    assert answer.mean.shape == (4, len(TARGETS))
    assert answer.mean.dtype == torch.float32
    assert answer.loss.isfinite()
    torch.testing.assert_close(answer.loss, torch.stack(list(answer.losses.values())).sum())
    if answer.importance is not None:
        assert answer.importance.shape == (4, WIDTH)
        assert ((answer.importance >= 0) & (answer.importance <= 1)).all()
        assert (answer.importance[-1, -20:] == 0).all()
    if answer.attention is not None:
        assert WIDTH % answer.attention.shape[1] == 0
        torch.testing.assert_close(answer.attention.sum(1), torch.ones(4))


@every_system
def test_rows_do_not_depend_on_their_batch(case):
    system = toy_system(**case)
    batch = batch_for(system, rows=6)
    whole = answers(system, batch)
    close = {"rtol": 1e-5 if case["name"] in IMAGE else 0, "atol": 1e-6}
    assert_same(answers(system, batch), whole)
    for rows in ([5, 3, 0, 1, 4, 2], [2], [5, 1], [3, 3, 3]):
        assert_same(answers(system, chosen(batch, rows)), take(whole, rows), **close)


@every_system
def test_training_is_decided_by_the_seed(case):
    losses, gradients = [], []
    for seed in (0, 0, 1):
        system = toy_system(**case).train()
        torch.manual_seed(seed)
        answer = system(**batch_for(system))
        answer.loss.backward()
        losses.append(answer.loss.item())
        learned = [p.grad for p in system.parameters() if p.requires_grad]
        gradients.append(torch.cat([gradient.flatten() for gradient in learned]))
    assert losses[0] == losses[1]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2]) != is_drawn(case)


@every_system
def test_head_is_the_shared_one_and_decides(case):
    system = toy_system(**case)
    assert isinstance(system.head, ExpressionHead)
    batch = batch_for(system)
    before = answers(system, batch).mean
    # Where the site is the answer, or one layer serves all genes, a gene has but its mean.
    identity = not isinstance(system.head.net, nn.Sequential)
    with torch.no_grad():
        moved = system.head.mean if identity else system.head.net[-1].bias
        moved[0] += 1
    step = answers(system, batch).mean - before
    want = torch.tensor([[1.0 if identity else system.head.sd[0].item(), 0.0]] * 4)
    torch.testing.assert_close(step, want, rtol=1e-5, atol=1e-6)


@every_system
def test_bf16_autocast_is_finite_and_answers_float32(case):
    system = toy_system(**case).train()
    with torch.autocast("cpu", torch.bfloat16):
        answer = system(**batch_for(system))
    answer.loss.backward()
    assert answer.mean.dtype == torch.float32
    assert answer.mean.isfinite().all()
    assert all(p.grad.isfinite().all() for p in system.parameters() if p.grad is not None)


# Training


def train(system, batch, *, steps, lr=1e-2):
    torch.manual_seed(0)
    system.train()
    optimiser = torch.optim.AdamW(system.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        system(**batch).loss.backward()
        optimiser.step()
    return system.eval()


# A packed case stands for the slow backbone; that every loss falls, the adapters show below.
@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOW], ids=label)
def test_eight_rows_can_be_learned_by_heart(case):
    alone = {
        **dict.fromkeys(("mclstexp", "hescape", "comtip"), "head_gradient"),
        "dkan": "contrast_weight",
    }
    name = case["name"]  # a contrast has other aims
    system = toy_system(**case | ({alone[name]: name != "dkan"} if name in alone else {}))
    batch = batch_for(system, rows=8)
    if case["name"] == "gta":  # an untrained trunk hardly tells windows apart
        batch["trunk"] = torch.randn(8, *system.trunk.layout[:2])
    before = float(answers(system, batch).losses[supervised(case)])
    steps = {"agl": 250, "triplex": 100, "bg_triplex": 100}.get(case["name"], 300)
    steps = steps if case["name"] in IMAGE else 60
    draws = supervised(case) == "diffusion"
    if draws:  # each row under eight noises at a time
        steps, many = 100, chosen(batch, [*range(8)] * 8)
    train(system, many if draws else batch, steps=40 if "pack" in case else steps)
    enough = {"nsl": 0.9, "stem": 0.4}.get(case["name"], 0.3 if case["name"] in IMAGE else 0.1)
    assert float(answers(system, batch).losses[supervised(case)]) < enough * before


@every_system
def test_every_parameter_learns(case):
    system = toy_system(**case).train()
    system(**batch_for(system)).loss.backward()
    still = {
        name
        for name, parameter in system.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    }
    assert not still


@every_system
def test_masked_targets_do_not_count(case):
    system = toy_system(**case)
    batch = batch_for(system)
    batch.target_mask[1, 0] = batch.target_mask[2] = False
    before = answers(system, batch).losses[supervised(case)]
    batch.target[1, 0], batch.target[2] = 1e6, -1e6
    assert torch.equal(answers(system, batch).losses[supervised(case)], before)
    batch.target[0, 0] += 1
    assert not torch.equal(answers(system, batch).losses[supervised(case)], before)


# Of the image systems, those with Linear modules outside what an adapter carries whole.
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["name"] not in IMAGE or c.get("encoder") == "vit"], ids=label
)
def test_lora_is_the_identity_at_first_and_trains(case):
    system = toy_system(**case)
    batch = batch_for(system)
    before = answers(system, batch)
    inside = {
        name: isinstance(module, Conv1D)
        for name, module in system.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.partition(".")[0] not in system.whole
    }
    turned = any(inside.values())  # GPT-2 keeps its weights as inputs × outputs
    inside = [name for name, other in inside.items() if other == turned]
    config = peft.LoraConfig(r=2, target_modules=inside, fan_in_fan_out=turned)
    adapted = peft.get_peft_model(system, config).eval()
    # With an adapter in training prompts are read anew, which bfloat16 rounds otherwise.
    near = 1e-6 if case.get("llm_dtype") is None else 1e-3
    assert_same(answers(adapted, batch), before, rtol=0, atol=near)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    train(adapted, batch, steps=3)
    after = answers(adapted, batch)
    assert after.losses["expression"] < before.losses["expression"]


# Configurations, checkpoints, ensembles


@every_system
def test_missing_inputs_name_the_flag_that_supplies_them(case):
    system = toy_system(**case)
    batch = batch_for(system)
    assert system.needs == reads(case)
    flags = {
        "codes": "--genome",
        "signal": "--track h3k27ac=BIGWIG --track dnase=BIGWIG",
        "features": "--features",
        "text": "--text TABLE",
        **dict.fromkeys(
            ("patch", "window_tokens", "slide_tokens", "boundary", "window_boundary"),
            "--slide IMAGE",
        ),
    }
    for name in system.needs:
        lacking = {key: value for key, value in batch.items() if key != name}
        with pytest.raises(UserError, match=f"batch has no {name}.*{flags[name]}"):
            system(**lacking)


@every_system
def test_checkpoint_round_trip(case, tmp_path):
    system = toy_system(**case)
    batch = batch_for(system)
    system.save_pretrained(tmp_path)
    for loader in (type(system), System):
        loaded = loader.from_pretrained(tmp_path).eval()
        assert type(loaded) is type(system)
        assert_same(answers(loaded, batch), answers(system, batch))
        kept = loaded.config.to_dict()
        assert all(kept[key] == value for key, value in case.items() if key not in ONLY_TOY)


@pytest.mark.parametrize("case", [c for c in CASES if c["name"] in IMAGE], ids=label)
def test_what_follows_the_weights_is_kept(case, tmp_path):
    system = toy_system(**case)
    parts = {
        "train": [toy_spots(6, seed=1, system=system), toy_spots(5, seed=2, system=system)],
        "valid": [toy_spots(4, seed=3, system=system)],
    }
    system.prepare(lambda part: iter(parts[part]))
    for _ in range(2):  # whatever was there before
        system.settle(lambda part: iter(parts[part]))
    batch = toy_spots(5, seed=4, system=system)
    settled = answers(system, batch)
    assert settled.mean.isfinite().all()
    blind = {key: value for key, value in batch.items() if key != "expression"}
    blind["target"] = blind["target"] + 5
    assert_same(answers(system, Batch(**blind)), settled)  # what was measured says nothing
    for rows in ([4, 1], [2], [0, 1, 2, 3, 4]):
        assert_same(
            answers(system, chosen(batch, rows)), take(settled, rows), rtol=1e-6, atol=1e-5
        )
    system.save_pretrained(tmp_path)
    assert_same(answers(System.from_pretrained(tmp_path).eval(), batch), settled)


def test_checkpoints_load_in_a_fresh_process(tmp_path):
    for index, case in enumerate(CASES):
        system = toy_system(**case)
        system.save_pretrained(tmp_path / str(index))
        batch = batch_for(system)
        torch.save((dict(batch), answers(system, batch).mean), tmp_path / f"{index}.pt")
    script = (
        "import sys, torch\n"
        "from seq2expr.model.system import System\n"
        "for i in range(int(sys.argv[2])):\n"
        "    system = System.from_pretrained(f'{sys.argv[1]}/{i}').eval()\n"
        "    batch, mean = torch.load(f'{sys.argv[1]}/{i}.pt')\n"
        "    with torch.no_grad():\n"
        "        torch.testing.assert_close(system(**batch).mean, mean, rtol=0, atol=1e-6)\n"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(tmp_path), str(len(CASES))]
    fresh = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr


@every_system
def test_unknown_settings_are_refused(case):
    config_class = system_class(case["name"]).config_class
    own = [key for key in case if key not in (*ONLY_TOY, "profiles")]
    check_settings(config_class, dict.fromkeys(own))
    for wrong in NOT_SETTINGS[case["name"]]:
        with pytest.raises(UserError, match=rf"Unknown key 'model.{wrong}'; known there: .*head"):
            check_settings(config_class, {wrong: 1})


@every_name
def test_an_unknown_choice_is_refused(name):
    settings, message = WRONG[name]
    system = system_class(name)
    with pytest.raises(UserError, match=message):
        system(system.config_class(targets=["y"], **settings))


@every_name
def test_ensemble_is_the_mean_of_its_members(name, tmp_path):
    systems = [toy_system(name, seed=seed) for seed in range(11)]
    for index, system in enumerate(systems):
        system.save_pretrained(tmp_path / "members" / str(index))
    ensemble = System.from_pretrained(tmp_path).eval()
    assert isinstance(ensemble, Ensemble)
    assert ensemble.needs == systems[0].needs
    batch = toy_batch_for(systems[0])
    alone = [answers(system, batch) for system in systems]
    for member, answer in zip(ensemble.members, alone, strict=True):  # 10 comes after 2
        assert torch.equal(answers(member, batch).mean, answer.mean)
    together = answers(ensemble, batch)
    torch.testing.assert_close(together.mean, sum(a.mean for a in alone) / 11)
    for field in ("importance", "attention"):
        if getattr(alone[0], field) is None:
            assert getattr(together, field) is None
        else:
            mean = sum(answer[field] for answer in alone) / 11
            torch.testing.assert_close(together[field], mean)
    assert together.profile is None


# Batches


def test_batch_survives_pickling_and_moves_as_one():
    batch = toy_batch()
    for copy in (pickle.loads(pickle.dumps(batch)), send_to_device(batch, "cpu")):
        assert isinstance(copy, Batch)
        assert copy.ids == batch.ids
        assert copy.profile is None
        assert list(copy) == list(batch)
        assert all(torch.equal(copy[k], batch[k]) for k in batch if k != "ids")
    moved = send_to_device(batch, "meta")
    assert isinstance(moved, Batch)
    assert moved.ids == batch.ids
    assert {value.device.type for name, value in moved.items() if name != "ids"} == {"meta"}
