from __future__ import annotations

import torch

from loracompose.composition.rational import gelu_coefficients, rational


def test_it_is_the_quotient_of_polynomials():
    c = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.tensor([-2.0, -0.5, 0.0, 1.5], dtype=torch.float64)
    for got, value in zip(rational(x, c), x.tolist(), strict=True):
        above = sum(c[j].item() * value**j for j in range(7))
        below = 1 + abs(sum(c[6 + i].item() * value**i for i in range(1, 6)))
        assert abs(got.item() - above / below) < 1e-12


def test_it_starts_as_gelu():
    x = torch.linspace(-4, 4, 999, dtype=torch.float64)
    assert (rational(x, gelu_coefficients()) - torch.nn.functional.gelu(x)).abs().max() < 0.0025


def test_the_sum_below_changes_its_sign_at_zero_alone_as_the_fit_assumes():
    b, x = gelu_coefficients()[7:], torch.linspace(-4, 4, 999, dtype=torch.float64)
    below = sum(b[i] * x ** (i + 1) for i in range(5))
    assert (below * x >= 0).all()


def test_it_grows_at_most_linearly_and_stays_finite_in_float32():
    far = rational(torch.tensor([1e2, -1e2, 1e5, -1e5]), gelu_coefficients().float())
    assert torch.isfinite(far).all()
    assert (far.abs() <= torch.tensor([1e2, 1e2, 1e5, 1e5])).all()
