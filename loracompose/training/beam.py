"""BeamLoRA: a LoRA whose weakest ranks are replaced, while it trains, by earlier versions of its strongest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loracompose.training.beam_ranks import importance, pair_ranks, tail_counts
from loracompose.training.beam_settings import BeamSettings

ADAPTER = "default"  # the name get_peft_model gives to the adapter it makes


@dataclass(frozen=True)
class BeamEvent:
    """What one event of pruning and expansion did.

    Attributes:
        step: the optimizer step it followed.
        threshold: p, the share of all importance to be kept.
        replaced: (pruned rank, its source) pairs by module path; modules that kept all their ranks are left out.
        spared: ranks in the tail that were kept because half of their module was pruned already.
        mass: share of all importance that the pruned ranks had.
        lowest: smallest importance before the event.
        highest: largest importance before the event.
    """

    step: int
    threshold: float
    replaced: Mapping[str, tuple[tuple[int, int], ...]]
    spared: int
    mass: float
    lowest: float
    highest: float

    @property
    def pruned(self) -> int:
        """Ranks replaced, over all modules."""
        return sum(len(pairs) for pairs in self.replaced.values())


@dataclass(frozen=True)
class _Beam:
    """The ranks of one module: A (r, d_in), B (d_out, r), scores (r,), and `down`, the layer that computes A x."""

    module: str
    down: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    scores: nn.Parameter


class BeamLora:
    """BeamLoRA as a method of `run_steps`: learned importance of ranks, pruning, and expansion from earlier parameters.

    Gu et al., "BeamLoRA: Beam-Constraint Low-Rank Adaptation", ACL 2025, arXiv:2502.13604. A module computes
    y = W x + (α/r) B (imp ⊙ (A x)) with imp = softmax(s/τ) · r; its scores s (r,) begin at 0, where this is plain
    LoRA, and train with the factors, at the same rate. At an event (`BeamSettings` says when)

     1. all ranks of all modules are sorted by importance, and the tail beyond the share p of the total is pruned, so
        that K differs between modules;
     2. the K pruned ranks of a module take, in random pairs, the rows of A and columns of B that its K most important
        ranks had half a period earlier, with their Adam moments of then; the sources keep what they have now;
     3. s of a pruned rank and of its source become their mean, and the Adam moments of the module's s become 0.

    The rank never changes, nothing is merged into the base, and the output jumps at an event. Where we depart from the
    authors' code, and what one should know:

     * K may exceed r/2 in their code; a rank is then pruned and a source at once. Here, as in another branch of their
       code, the most important of a module's tail are spared until K is at most r/2.
     * Their code writes the old moments of A and B into a temporary copy (an assignment through a mask), so that
       pruned ranks in fact keep the moments they had. Here they are copied, as is plainly meant.
     * Their code also clears the moments of the scores of modules that lose no rank. Here such a module is left alone,
       so that a threshold of 1 is LoRA with a learned importance and nothing else.
     * Adam's count of steps is one for a whole factor, so moments half a period old are a little small for it: in the
       first events of a short run a regrown rank takes steps up to √2 longer, as with the authors.

    `fold` makes a plain LoRA of it by multiplying B by imp. In bfloat16, whose rounding is relative, it does not matter
    whether A or B takes it (tested); B is where this package folds a LoRA's scaling too.

    Args:
        model: the base with fresh LoRA factors; only linear layers.
        settings: the hyper-parameters.
        steps: optimizer steps in all.
        learning_rate: of the factors, which decides τ where `settings` does not.
        seed: of the pairing.

    Raises:
        ValueError: an adapted module is not linear, the rank is 1, or the run is too short for any event.
    """

    def __init__(
        self, model: PeftModel, settings: BeamSettings, *, steps: int, learning_rate: float, seed: int
    ) -> None:
        self.events: list[BeamEvent] = []
        self.temperature = settings.temperature_at(learning_rate)
        self._beams = tuple(_beams(model))
        self._thresholds = {step: settings.threshold_at(step, steps) for step in settings.event_steps(steps)}
        self._remembering = {step - settings.period_of(steps) // 2 for step in self._thresholds}
        self._generator = torch.Generator().manual_seed(seed)
        # module -> "A", "B" -> the factor and its two Adam moments, from half a period before the next event until it
        self._history: dict[str, dict[str, tuple[Tensor, ...]]] = {}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The scores of every module."""
        return {f"{beam.module}.scores": beam.scores for beam in self._beams}

    def importances(self) -> dict[str, Tensor]:
        """The importance (r,) of each module's ranks as they are now."""
        return {beam.module: importance(beam.scores.detach(), self.temperature) for beam in self._beams}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context the model's LoRA layers weigh their ranks by importance."""

        def weigh(scores: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
            return h * importance(scores, self.temperature)  # (..., r)

        with ExitStack() as stack:
            for beam in self._beams:
                stack.callback(beam.down.register_forward_hook(partial(weigh, beam.scores)).remove)
            yield

    @torch.no_grad()
    def after_step(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember the factors half a period before an event; at an event, prune and expand."""
        if number in self._remembering:
            self._history = {
                beam.module: {
                    name: tuple(tensor.clone() for tensor in _with_moments(parameter, optimizer, beam.module))
                    for name, parameter in (("A", beam.A), ("B", beam.B))
                }
                for beam in self._beams
            }
        if number in self._thresholds:
            self.events.append(self._replace(number, optimizer))
            self._history = {}

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply B by the importance and set the scores to 0: the model computes the same, attached or not."""
        for beam in self._beams:
            beam.B.mul_(importance(beam.scores, self.temperature))  # (d_out, r) * (r,)
            beam.scores.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs besides the parameters and the optimizer."""
        return {
            "history": self._history,
            "events": [asdict(event) for event in self.events],
            "random": self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self.events = [BeamEvent(**event) for event in state["events"]]
        self._generator.set_state(state["random"])
        device = self._beams[0].A.device
        self._history = {
            module: {name: tuple(tensor.to(device) for tensor in tensors) for name, tensors in factors.items()}
            for module, factors in state["history"].items()
        }

    def _replace(self, number: int, optimizer: torch.optim.Optimizer) -> BeamEvent:
        values = {module: imp.cpu() for module, imp in self.importances().items()}
        tail = tail_counts(values, self._thresholds[number])
        replaced, mass = {}, 0.0
        for beam in self._beams:
            imp = values[beam.module]
            count = min(tail[beam.module], len(imp) // 2)
            if count:
                pruned, sources = pair_ranks(imp, count, self._generator)
                replaced[beam.module] = tuple(zip(pruned.tolist(), sources.tolist(), strict=True))
                mass += imp[pruned].double().sum().item()
                self._regrow(beam, pruned.to(beam.A.device), sources.to(beam.A.device), optimizer)
        everything = torch.cat(list(values.values()))
        return BeamEvent(
            step=number,
            threshold=self._thresholds[number],
            replaced=replaced,
            spared=sum(tail.values()) - sum(map(len, replaced.values())),
            mass=mass / len(everything),
            lowest=everything.min().item(),
            highest=everything.max().item(),
        )

    def _regrow(self, beam: _Beam, pruned: Tensor, sources: Tensor, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter, dim in (("A", beam.A, 0), ("B", beam.B, 1)):
            now = _with_moments(parameter, optimizer, beam.module)
            for current, old in zip(now, self._history[beam.module][name], strict=True):
                current.index_copy_(dim, pruned, old.index_select(dim, sources))
        scores, *moments = _with_moments(beam.scores, optimizer, beam.module)
        mean = (scores[pruned] + scores[sources]) / 2  # (count,)
        scores[pruned] = mean
        scores[sources] = mean
        for moment in moments:
            moment.zero_()


def _beams(model: PeftModel) -> Iterator[_Beam]:
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        module = name.removeprefix("base_model.model.")
        if ADAPTER not in layer.lora_A:
            raise ValueError(f"BeamLoRA adapts linear layers, and {module} is none: leave it out of target_modules")
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if len(A) < 2:
            raise ValueError(f"{module} has rank 1, so no rank could take another's place: train with rank 2 or more")
        yield _Beam(module, layer.lora_A[ADAPTER], A, B, nn.Parameter(torch.zeros_like(A[:, 0])))


def _with_moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, module: str) -> tuple[Tensor, ...]:
    """The values of a parameter and its first and second Adam moment, to be changed in place."""
    state = optimizer.state.get(parameter)
    if not state:
        raise ValueError(f"no step has reached {module} so far, so its ranks cannot be judged: do not adapt it")
    return parameter.data, state["exp_avg"], state["exp_avg_sq"]
