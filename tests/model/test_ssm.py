import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from seq2expr.model.ssm import BiMamba, BiMambaStack
from tests.model.test_scan import naive_scan

SMALL = {"n_layer": 2, "d_state": 4}


def test_parameter_counts_are_the_published_ones():
    stack = BiMambaStack(128)
    count = [sum(p.numel() for p in m.parameters()) for m in (stack, stack.layers[0])]
    assert count == [539_264, 134_784]


def test_initialisation_follows_mamba():
    torch.manual_seed(0)
    stack = BiMambaStack(128, init_layers=64)
    for direction in (stack.layers[1].mixer.forth, stack.layers[1].mixer.back):
        steps = nn.functional.softplus(direction.dt_proj.bias.detach())
        assert float(steps.min()) >= 1e-3 * 0.999
        assert float(steps.max()) <= 1e-1 * 1.001
        assert abs(float(steps.log10().mean()) + 2) < 0.15
        assert float(direction.dt_proj.weight.detach().abs().max()) <= 8**-0.5
        torch.testing.assert_close(-direction.A_log.detach().exp()[7], -torch.arange(1.0, 17.0))
        assert torch.equal(direction.D, torch.ones(256))
    for depth, layer in ((64, stack.layers[0]), (4, BiMambaStack(128).layers[0])):
        bound = 1 / math.sqrt(256 * depth)
        largest = float(layer.mixer.out_proj.weight.detach().abs().max())
        assert 0.99 * bound < largest <= bound * 1.0001


def reference_block(block, x):
    """Mamba_f(x) + flip(Mamba_r(flip(x))), each a whole Mamba block as in its paper."""

    def mamba(direction, x):
        v, z = block.in_proj(x).chunk(2, dim=-1)
        v = nn.functional.silu(
            nn.functional.conv1d(
                v.transpose(1, 2),
                direction.conv1d.weight,
                direction.conv1d.bias,
                padding=direction.conv1d.kernel_size[0] - 1,
                groups=v.shape[-1],
            )[..., : x.shape[1]].transpose(1, 2)
        )
        n = direction.A_log.shape[1]
        dt, b, c = direction.x_proj(v).split([direction.dt_proj.in_features, n, n], dim=-1)
        delta = nn.functional.softplus(direction.dt_proj(dt))
        parameters = (-direction.A_log.exp()[None], direction.D[None])
        y = naive_scan(
            v[:, None], delta[:, None], parameters[0], b[:, None], c[:, None], parameters[1]
        )
        return block.out_proj(y[:, 0] * nn.functional.silu(z))

    return mamba(block.forth, x) + mamba(block.back, x.flip(1)).flip(1)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_block_is_the_sum_of_two_mamba_blocks(length):
    torch.manual_seed(0)
    block = BiMamba(4, d_state=3).double()
    x = torch.randn(2, length, 4, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), reference_block(block, x), rtol=1e-11, atol=1e-13)


def test_stack_is_prenorm_residual():
    torch.manual_seed(0)
    stack = BiMambaStack(4, **SMALL)
    x = torch.randn(1, 6, 4)
    h = x
    for layer in stack.layers:
        h = h + layer.mixer(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5))
    expected = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(stack(x), expected)


def test_every_position_sees_every_other():
    torch.manual_seed(0)
    stack = BiMambaStack(4, **SMALL).double()
    x = torch.randn(1, 30, 4, dtype=torch.float64, requires_grad=True)
    for position in (0, 15, 29):
        (grad,) = torch.autograd.grad(stack(x)[0, position].square().sum(), x)
        assert bool((grad.abs().sum(-1) > 0).all())


def test_padding_changes_neither_values_nor_gradients():
    torch.manual_seed(0)
    stack = BiMambaStack(6, chunk=4, **SMALL).double()
    lengths = torch.tensor([9, 1, 14])
    x = torch.randn(3, 17, 6, dtype=torch.float64)
    weights = torch.randn(3, 17, 6, dtype=torch.float64)
    garbage = x.clone()
    for row, length in enumerate(lengths):
        garbage[row, length:] = float("nan")
    out = stack(garbage, lengths)
    (out * weights).sum().backward()
    got = [p.grad.clone() for p in stack.parameters()]
    stack.zero_grad()
    for row, length in enumerate(lengths):
        alone = stack(x[row : row + 1, :length])
        torch.testing.assert_close(out[row : row + 1, :length], alone, rtol=1e-12, atol=1e-12)
        assert torch.count_nonzero(out[row, length:]) == 0
        (alone * weights[row : row + 1, :length]).sum().backward()
    for grad, parameter in zip(got, stack.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-10)


def test_rows_do_not_depend_on_their_batch():
    torch.manual_seed(0)
    stack = BiMambaStack(16)
    x = torch.randn(5, 70, 16)
    with torch.no_grad():
        together, alone = stack(x), torch.cat([stack(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_chunk_size_and_checkpointing_change_nothing():
    torch.manual_seed(0)
    plain = BiMambaStack(8, **SMALL)
    x = torch.randn(2, 50, 8)
    results = []
    for options in ({}, {"chunk": 7}, {"checkpointing": True}):
        stack = BiMambaStack(8, **SMALL, **options)
        stack.load_state_dict(plain.state_dict())
        out = stack(x, torch.tensor([50, 33]))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in stack.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_bf16_autocast_stays_close_and_finite():
    torch.manual_seed(0)
    stack = BiMambaStack(32, n_layer=2)
    x = torch.randn(2, 100, 32)
    exact = stack(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = stack(x)
        out.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in stack.parameters())
    assert float((out.float() - exact).detach().abs().max()) < 0.1


def test_stack_round_trips_through_safetensors(tmp_path):
    torch.manual_seed(0)
    first, second = BiMambaStack(8, **SMALL), BiMambaStack(8, **SMALL)
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(1, 20, 8)
    assert torch.equal(first(x), second(x))


MEMORY = """
import json, resource, sys, torch
from seq2expr.model.ssm import BiMambaStack

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

torch.set_num_threads(1)
stack = BiMambaStack(128, n_layer=2, checkpointing=True)
stack(torch.randn(1, 64, 128)).sum().backward()
before = peak()
stack(torch.randn(1, int(sys.argv[1]), 128)).sum().backward()
print(json.dumps(peak() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_of_a_training_step_scales_to_200_kb_in_12_gib():
    length = 2_000
    command = [sys.executable, "-c", MEMORY, str(length)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) * 200_000 / length < 12 * 2**10
