"""When BeamLoRA prunes and how much: its settings as a value, and its schedule over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The authors' script prunes every 3,000 of 37,031 steps.
PERIOD_SHARE = 3_000 / 37_031


@dataclass(frozen=True)
class BeamSettings:
    """Hyper-parameters of BeamLoRA (arXiv:2502.13604), scaled to the length of a run.

    Pruning is eager early and fades: p(step) = 1 - (1 - threshold) (1 + cos(π step / (end · steps))) / 2, and nothing
    is pruned once p is 1. The authors' script trains 37,031 steps at rank 64, prunes every 3,000 steps as long as
    3,000 more are left, and lets p reach 1 at step 24,688, two thirds of the run: eight events.

    Attributes:
        threshold: p at the start, the share of all importance that is kept; 1 prunes nothing and only learns scores.
        period: steps between two events; None is the authors' share of the run, 8.1 %, but at least 2 steps.
        end: share of the run after which p is 1.
        temperature: τ of the softmax over the scores; None is the authors' rule, 0.05 for learning rates of 1e-4 and
            more, else 0.03. Under Adam it is also the speed of the scores: τ/2 does what twice the rate would.

    Raises:
        ValueError: a value is out of its range.
    """

    threshold: float = 0.95
    period: int | None = None
    end: float = 2 / 3
    temperature: float | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.period is not None and self.period < 2:
            raise ValueError(f"period must be at least 2 steps, since ranks are remembered half way, got {self.period}")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    def period_of(self, steps: int) -> int:
        """Steps between two events in a run of `steps`."""
        return self.period or max(2, round(PERIOD_SHARE * steps))

    def temperature_at(self, learning_rate: float) -> float:
        """The temperature in use."""
        return self.temperature or (0.05 if learning_rate >= 1e-4 else 0.03)

    def threshold_at(self, step: int, steps: int) -> float:
        """The share p to be kept after `step` of `steps`."""
        done = step / (self.end * steps)
        return 1.0 if done >= 1 else 1 - (1 - self.threshold) * (1 + math.cos(math.pi * done)) / 2

    def event_steps(self, steps: int) -> tuple[int, ...]:
        """The steps after which ranks are pruned: multiples of the period with p < 1 and a period left to train.

        Raises:
            ValueError: there is none, so that nothing could ever be pruned.
        """
        period = self.period_of(steps)
        found = tuple(
            step for step in range(period, steps - period + 1, period) if self.threshold_at(step, steps) < 1.0
        )
        if not found and self.threshold < 1:
            raise ValueError(
                f"BeamLoRA would prune nothing in {steps} steps at a period of {period} and an end of {self.end:.3g}: "
                "train for longer, shorten the period, or set the threshold to 1 to learn the importance alone"
            )
        return found
