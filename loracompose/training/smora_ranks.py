"""SMoRA as a method of `run_steps`: ranks gated by a router that trains with them, and a balanced load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from loracompose.adapters.lora import LoraFactors
from loracompose.composers.base import Pool
from loracompose.composers.smora import Smora, block_gate
from loracompose.composers.smora_gates import LOAD
from loracompose.composition.bank import RankBank
from loracompose.composition.gates import GateContext
from loracompose.composition.router import Router, RouterAdapter
from loracompose.training.smora_settings import SmoraSettings

ADAPTER = "default"  # the name get_peft_model gives to the adapter it makes


@dataclass
class LoadLog:
    """How the tokens of the training were spread over blocks of ranks; part of a checkpoint.

    Attributes:
        violation: a step each: how far the fullest block of a module is above the mean, max / mean - 1, averaged over
            the modules; 0 is perfect balance.
        first: module -> tokens of each block, (blocks,), over the first tenth of the steps.
        last: the same over the last tenth.
    """

    violation: list[float]
    first: dict[str, Tensor]
    last: dict[str, Tensor]

    def note(self, loads: Mapping[str, Tensor], number: int, steps: int) -> None:
        """Count the loads of step `number` of `steps`."""
        excess = [(load.max() / load.double().mean().clamp_min(1)).item() - 1 for load in loads.values()]
        self.violation.append(sum(excess) / len(excess))
        tenth = max(1, steps // 10)
        for part, counts in ((self.first, number <= tenth), (self.last, number > steps - tenth)):
            if counts:
                for module, load in loads.items():
                    part[module] = part.get(module, torch.zeros_like(load)) + load

    def record(self) -> dict[str, Any]:
        """The log as JSON."""
        parts = {
            name: {m: load.tolist() for m, load in part.items()}
            for name, part in vars(self).items()
            if name != "violation"
        }
        return {"violation": [round(v, 4) for v in self.violation], **parts}


class SmoraRanks:
    """SMoRA (arXiv:2501.15103) while it trains: y = W x + (α/r) B (g ∘ (A x)), Σ g = r over the k ranks that act.

    The gates are those of `Smora` in its adapter form, made from the live parameters, so what trains is what runs
    later. Within `attached` they multiply the outputs of PEFT's A. W_g trains with the factors at their rate; after
    every optimizer step the biases take a balancing step from the loads of its forward pass, padding left out (but not
    in an encoder-decoder, whose modules read tokens of two kinds).

    Args:
        model: the base with fresh LoRA factors on linear layers.
        settings: the hyper-parameters.
        steps: optimizer steps in all.
        seed: of W_g.
        base_model: name of the base.

    Raises:
        ValueError: the settings do not fit the rank, or a module is not linear.
    """

    def __init__(self, model: PeftModel, settings: SmoraSettings, *, steps: int, seed: int, base_model: str) -> None:
        self._model, self._steps = model, steps
        self._encoders = dict(_encoders(model))
        first = Smora.initial(_pool(model, base_model), seed, settings.for_router(steps))
        self._router = replace(first, tensors={n: t.to(model.device) for n, t in first.tensors.items()})
        biases = Smora(self._router).untrained
        self._parameters = {n: nn.Parameter(t) for n, t in self._router.tensors.items() if n not in biases}
        self._biases = {n: t for n, t in self._router.tensors.items() if n in biases}
        self._scratch: dict[str, Tensor] = {}
        self._mask: Tensor | None = None
        self.log = LoadLog([], {}, {})

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """W_g of every module."""
        return self._parameters

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context the model's LoRA layers gate their ranks."""
        with ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            for module, encoder in self._encoders.items():
                stack.callback(encoder.register_forward_hook(self._gate(module)).remove)
            yield

    @torch.no_grad()
    def after_step(self, number: int, optimizer: torch.optim.Optimizer) -> None:
        """A balancing step of the biases."""
        self._biases.update(Smora(self._live()).after_step(self._scratch))
        loads = {key.removeprefix(LOAD): load.cpu() for key, load in self._scratch.items()}
        self.log.note(loads, number, self._steps)

    def state(self) -> dict[str, Any]:
        """The biases and the log."""
        return {"biases": self._biases, "log": vars(self.log)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state."""
        self._biases = {name: bias.to(self._model.device) for name, bias in state["biases"].items()}
        self.log = LoadLog(**state["log"])

    def router(self, adapter: RouterAdapter, training: Mapping[str, Any]) -> Router:
        """What was learned, for the adapter as it was written: W_g in bfloat16 like its factors, biases in float32."""
        live = {n: p.detach().to(torch.bfloat16) for n, p in self._parameters.items()} | self._biases
        tensors = {name: tensor.cpu() for name, tensor in sorted(live.items())}
        return replace(self._router, tensors=tensors, adapters=(adapter,), training=training)

    def _live(self) -> Router:
        return replace(self._router, tensors={**self._biases, **self._parameters})

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scratch.clear()
        both = self._model.config.is_encoder_decoder
        self._mask = None if both else kwargs.get("attention_mask")

    def _gate(self, module: str) -> Any:
        rank = self._encoders[module].weight.shape[0]
        place, active = torch.arange(rank, device=self._model.device), int(self._router.settings["active"])

        def hook(encoder: nn.Module, inputs: tuple[Tensor], h: Tensor) -> Tensor:
            gate = block_gate(self._live(), module, place, rank, active)
            context = GateContext(module, attention_mask=self._mask, scratch=self._scratch)
            return h * gate(inputs[0], h, h.new_ones(h.shape[0], rank), context)

        return hook


def _encoders(model: PeftModel) -> Iterator[tuple[str, nn.Linear]]:
    """Path in the base model -> the linear map A, sorted."""
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    for name in sorted(layers):
        if ADAPTER not in layers[name].lora_A:
            raise ValueError(f"{name!r} is not linear, and SMoRA gates ranks of linear layers: take it off the targets")
        yield name, layers[name].lora_A[ADAPTER]


def _pool(model: PeftModel, base_model: str) -> Pool:
    """The adapter in the making as a pool of one, under a name that no fingerprint has."""
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    banks = {}
    for name, encoder in _encoders(model):
        factors = LoraFactors(encoder.weight.detach(), layers[name].lora_B[ADAPTER].weight.detach())
        banks[name] = RankBank(name, (factors,), ("in the making",))
    return Pool(base_model, int(getattr(model.config, "hidden_size", 0)), ("in the making",), banks)
