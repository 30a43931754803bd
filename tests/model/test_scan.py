import warnings
from types import SimpleNamespace

import pytest
import torch

from seq2expr.errors import Seq2ExprWarning
from seq2expr.model import scan
from seq2expr.model.scan import selective_scan


def scan_inputs(length, *, rows=2, inner=3, states=2, dtype=torch.float64, step=1.0):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = (
        normal(rows, 2, length, inner),
        normal(rows, 2, length, inner).abs() * step,
        -normal(2, inner, states).abs() - 0.1,
        normal(rows, 2, length, states),
        normal(rows, 2, length, states),
        normal(2, inner),
    )
    return tuple(x.requires_grad_() for x in inputs)


def naive_scan(u, delta, A, B, C, D):
    """One number at a time, from the definition."""
    y = torch.zeros_like(u)
    for row in range(u.shape[0]):
        for group in range(u.shape[1]):
            for channel in range(u.shape[3]):
                h = torch.zeros_like(A[group, channel])
                for t in range(u.shape[2]):
                    x, dt = u[row, group, t, channel], delta[row, group, t, channel]
                    h = torch.exp(dt * A[group, channel]) * h + dt * x * B[row, group, t]
                    out = (C[row, group, t] * h).sum() + D[group, channel] * x
                    y = y.index_put(tuple(map(torch.tensor, (row, group, t, channel))), out)
    return y


def test_scan_and_its_gradients_match_the_definition():
    inputs = scan_inputs(11)
    weights = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = naive_scan(*inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for chunk in (1, 4, 11, 64):
        got = selective_scan(*inputs, chunk=chunk)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad((got * weights).sum(), inputs)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_scan_passes_gradcheck(length):
    inputs = scan_inputs(length, rows=1, inner=2)
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, chunk=2), inputs)


@pytest.mark.parametrize("step", [1e-6, 1.0, 1e4])
def test_scan_in_single_precision_is_exact_for_small_and_huge_steps(step):
    exact = scan_inputs(150, rows=1, step=step)
    single = tuple(x.detach().float().requires_grad_() for x in exact)
    got, want = selective_scan(*single, chunk=32), selective_scan(*exact, chunk=150)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4 * step)
    got.sum().backward()
    want.sum().backward()
    for x, y in zip(single, exact, strict=True):
        scale = float(y.grad.abs().max())
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5 * scale)


def test_scan_takes_and_returns_bf16_but_computes_in_single_precision():
    inputs = tuple(x.detach().float() for x in scan_inputs(40))
    low = tuple(x.bfloat16() for x in inputs)
    expected = selective_scan(*(x.float() for x in low))
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(*low)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected.bfloat16(), rtol=0, atol=0)


def test_fused_kernel_is_called_in_its_own_layout():
    inputs = tuple(x.detach().float() for x in scan_inputs(7, inner=3, states=2))

    def kernel(u, delta, A, B, C, D):
        assert (u.shape, A.shape, B.shape) == ((2, 6, 7), (6, 2), (2, 2, 2, 7))
        per_channel = (x.repeat_interleave(3, dim=1) for x in (B, C))
        B, C = (x.transpose(2, 3) for x in per_channel)
        y = naive_scan(u[..., None], delta[..., None], A[:, None], B, C, D[:, None])
        return y.squeeze(-1)

    got = scan._fused_scan(kernel, *inputs)
    torch.testing.assert_close(got, selective_scan(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("installed", ["mamba_ssm.ops.selective_scan_interface", "kernels"])
def test_installed_kernel_is_found(monkeypatch, installed):
    interface = SimpleNamespace(selective_scan_fn=naive_scan)
    hub = SimpleNamespace(ops=SimpleNamespace(selective_scan_interface=interface))
    kernels = SimpleNamespace(get_kernel=lambda name, version: hub)

    def find(name):
        if name != installed:
            raise ImportError(name)
        return kernels if name == "kernels" else interface

    monkeypatch.setattr(scan, "import_module", find)
    assert scan._fused_kernel.__wrapped__() is naive_scan


def test_missing_kernel_is_told_once(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(scan, "import_module", missing)
    scan._fused_kernel.cache_clear()
    with pytest.warns(Seq2ExprWarning, match="mamba-ssm"):
        assert scan._fused_kernel() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan._fused_kernel() is None
    scan._fused_kernel.cache_clear()
