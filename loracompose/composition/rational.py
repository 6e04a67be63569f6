"""Rational activation: a learned quotient of polynomials that starts as GeLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUMERATOR, DENOMINATOR = 7, 5  # coefficients: x⁰..x⁶ above, x¹..x⁵ below
COEFFICIENTS = NUMERATOR + DENOMINATOR
REACH = 4.0  # the fit to GeLU covers [-REACH, REACH]


def rational(x: Tensor, coefficients: Tensor) -> Tensor:
    """(Σ_{j=0..6} a_j x^j) / (1 + |Σ_{i=1..5} b_i x^i|), entry by entry; coefficients (12,) are a, then b.

    Grows at most linearly: far out it tends to |x| · a_6 / |b_5|.

    Source: Padé activation units, arXiv:1907.06732, in their form without poles.
    """
    above, below = torch.zeros_like(x), torch.zeros_like(x)
    for a in coefficients[:NUMERATOR].flip(0):  # Horner's scheme
        above = above * x + a
    for b in coefficients[NUMERATOR:].flip(0):
        below = (below + b) * x
    return above / (1 + below.abs())


def gelu_coefficients() -> Tensor:
    """Coefficients (12,) in float64 with which `rational` is GeLU within 0.0025 on [-4, 4].

    Least squares on Σ a_j x^j - gelu(x) sign(x) Σ b_i x^i = gelu(x): linear, because |Σ b_i x^i| is written as
    sign(x) Σ b_i x^i, which holds where the sum changes its sign at 0 alone, as that of the solution does.
    """
    x = torch.linspace(-REACH, REACH, 2001, dtype=torch.float64)[:, None]  # (points, 1)
    gelu = F.gelu(x)
    below = -gelu * x.sign() * x ** torch.arange(1, DENOMINATOR + 1)
    system = torch.cat([x ** torch.arange(NUMERATOR), below], dim=1)  # (points, 12)
    found: Tensor = torch.linalg.lstsq(system, gelu).solution
    return found.flatten()
