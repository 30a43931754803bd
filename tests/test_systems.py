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

from seq2expr.errors import UserError
from seq2expr.model.batch import Batch, Prediction
from seq2expr.model.heads import ExpressionHead
from seq2expr.model.system import Ensemble, System, check_settings, system_class
from seq2expr.registry import BACKBONES, SYSTEMS
from tests.toy import TARGETS, WIDTH, toy_batch, toy_system

VARIANTS = {
    "seq2exp": [
        *({"mask": mask} for mask in ("soft", "hard", "none", "promoter")),
        {"mask": "soft", "pool": "attention"},
        {"mask": "soft", "profiles": ["guanines"], "profile_weight": 0.1},
    ]
}
SPECIAL = {
    "seq2exp": [
        {"backbone": "bimamba", "mask": "hard", "pack": True},
        # The published hard variant is left out: its rows depend on their batch (a documented
        # defect, see tests/systems/test_seq2exp.py).
        {"backbone": "bimamba", "mask": "soft", "faithful": True},
    ]
}
CASES = [
    {"name": entry.name, **settings}
    for entry in SYSTEMS
    for settings in [
        *({"backbone": b.name} | variant for b in BACKBONES for variant in VARIANTS[entry.name]),
        *SPECIAL[entry.name],
    ]
]


def label(case):
    words = {"pack": "packed", "faithful": "faithful", "profiles": "profiles"}
    return "-".join(str(words.get(key, value)) for key, value in case.items())


every_system = pytest.mark.parametrize("case", CASES, ids=label)


def batch_for(system: System, rows: int = 4, seed: int = 0) -> Batch:
    batch = toy_batch(rows, seed=seed)
    if system.config.profiles:
        batch.profile = (batch.codes == 2).half().unsqueeze(1)
        batch.profile_scale = torch.tensor([2.0])
    return batch


def chosen(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, in this order."""
    whole = ("signal_scale", "profile_scale")
    fields = {
        name: [value[i] for i in rows] if name == "ids" else value[rows]
        for name, value in batch.items()
        if name not in whole
    }
    return Batch(**fields, **{name: batch[name] for name in whole if name in batch})


def answers(system, batch: Batch) -> Prediction:
    with torch.no_grad():
        return system(**batch)


def assert_same(one: Prediction, other: Prediction, **tolerance: float) -> None:
    for name in ("mean", "importance", "profile"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, **(tolerance or {"rtol": 0, "atol": 0}))


def take(answer: Prediction, rows: list[int]) -> Prediction:
    return Prediction(**{name: answer[name][rows] for name in ("mean", "importance", "profile")
                         if name in answer})  # fmt: skip


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


@every_system
def test_rows_do_not_depend_on_their_batch(case):
    system = toy_system(**case)
    batch = batch_for(system, rows=6)
    whole = answers(system, batch)
    close = {"rtol": 0, "atol": 1e-6}
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
        gradients.append(torch.cat([p.grad.flatten() for p in system.parameters()]))
    assert losses[0] == losses[1]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2]) == (case["mask"] in ("none", "promoter"))


@every_system
def test_head_is_the_shared_one_and_decides(case):
    system = toy_system(**case)
    assert isinstance(system.head, ExpressionHead)
    batch = batch_for(system)
    before = answers(system, batch).mean
    with torch.no_grad():
        system.head.net[-1].bias += torch.tensor([1.0, 0.0])
    step = answers(system, batch).mean - before
    want = torch.tensor([[system.head.sd[0].item(), 0.0]] * 4)
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
@pytest.mark.parametrize(
    "case", [c for c in CASES if c["backbone"] == "conv" or "pack" in c], ids=label
)
def test_eight_rows_can_be_learned_by_heart(case):
    system = toy_system(**case)
    batch = batch_for(system, rows=8)
    before = float(answers(system, batch).losses["expression"])
    train(system, batch, steps=60 if case["backbone"] == "conv" else 40)
    assert float(answers(system, batch).losses["expression"]) < 0.1 * before


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
    before = answers(system, batch).losses["expression"]
    batch.target[1, 0], batch.target[2] = 1e6, -1e6
    assert torch.equal(answers(system, batch).losses["expression"], before)
    batch.target[0, 0] += 1
    assert not torch.equal(answers(system, batch).losses["expression"], before)


@every_system
def test_lora_is_the_identity_at_first_and_trains(case):
    system = toy_system(**case)
    batch = batch_for(system)
    before = answers(system, batch)
    inside = [
        name
        for name, module in system.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(("head", "profile_head"))
    ]
    adapted = peft.get_peft_model(system, peft.LoraConfig(r=2, target_modules=inside)).eval()
    assert_same(answers(adapted, batch), before, rtol=0, atol=1e-6)
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
    assert system.needs == ("codes", "signal", "features")
    flags = {
        "codes": "--genome",
        "signal": "--track h3k27ac=BIGWIG --track dnase=BIGWIG",
        "features": "--features",
    }
    for name, flag in flags.items():
        lacking = {key: value for key, value in batch.items() if key != name}
        with pytest.raises(UserError, match=f"batch has no {name}.*{flag}"):
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
        assert {k: v for k, v in loaded.config.to_dict().items() if k in case} == {
            k: v for k, v in case.items() if k != "name"
        }


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
    check_settings(config_class, {k: v for k, v in case.items() if k not in ("name", "profiles")})
    for wrong in ("witdh", "target_mean", "hidden_size"):
        with pytest.raises(UserError, match=rf"Unknown key 'model.{wrong}'; known there: .*width"):
            check_settings(config_class, {wrong: 1})


@pytest.mark.parametrize("name", [entry.name for entry in SYSTEMS])
def test_unknown_backbone_is_refused(name):
    with pytest.raises(UserError, match="Unknown backbone 'cnn'; there are conv, bimamba"):
        system_class(name)(system_class(name).config_class(backbone="cnn", targets=["y"]))


@pytest.mark.parametrize("name", [entry.name for entry in SYSTEMS])
def test_ensemble_is_the_mean_of_its_members(name, tmp_path):
    systems = [toy_system(name, seed=seed) for seed in range(11)]
    for index, system in enumerate(systems):
        system.save_pretrained(tmp_path / "members" / str(index))
    ensemble = System.from_pretrained(tmp_path).eval()
    assert isinstance(ensemble, Ensemble)
    assert ensemble.needs == systems[0].needs
    batch = toy_batch()
    alone = [answers(system, batch) for system in systems]
    for member, answer in zip(ensemble.members, alone, strict=True):  # 10 comes after 2
        assert torch.equal(answers(member, batch).mean, answer.mean)
    together = answers(ensemble, batch)
    torch.testing.assert_close(together.mean, sum(a.mean for a in alone) / 11)
    torch.testing.assert_close(together.importance, sum(a.importance for a in alone) / 11)
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
