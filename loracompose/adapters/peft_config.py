"""What an `adapter_config.json` means: the fields that shape delta_W, read exactly; all others refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loracompose.adapters.patterns import MAX_WAYS, check_pattern, ways_to_match

ALL_LINEAR = "all-linear"


class UnsupportedAdapterError(ValueError):
    """The adapter is well formed, but its effect is not `B @ A` on named modules, so it is not loaded."""


# Fields that `LoraSettings` reads, and those without influence on a trained adapter's output.
_READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "base_model_name_or_path",
        "task_type",
    }
)
_INERT = frozenset(
    {
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
    }
)
# Initialisations that leave the base weights as they are.
_INITS = ("gaussian", "orthogonal", "eva")

_RETRAIN = "train a plain LoRA with this option off"
_REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "use_dora": (
            "DoRA rescales the columns of the base weight, delta_W is not scaling * B @ A",
            "merge it into the base and extract a plain LoRA, or train without DoRA",
        ),
        "lora_bias": ("lora_B carries a bias, which is not part of B @ A", _RETRAIN),
        "bias": ("biases of the base model were trained and saved", 'train with bias="none"'),
        "modules_to_save": ("whole modules of the base were trained and saved", "train without modules_to_save"),
        "trainable_token_indices": ("rows of the embedding were trained and saved", _RETRAIN),
        "target_parameters": ("it adapts bare parameters, not modules", "use target_modules"),
        "layer_replication": ("it changes the layers of the base model", _RETRAIN),
        "alora_invocation_tokens": ("activated LoRA acts only after its invocation tokens", _RETRAIN),
        "use_qalora": ("QALoRA pools the input of A, delta_W is not B @ A", _RETRAIN),
        "kasa_config": ("KaSA truncates the base weight and puts singular values between A and B", _RETRAIN),
        "arrow_config": ("Arrow routes between several adapters; this is no single one", "load its parts"),
        "use_bdlora": ("A or B is stored block-diagonally", _RETRAIN),
        "monteclora_config": ("MonteCLoRA samples its weights", _RETRAIN),
        "velora_config": ("VeLoRA replaces the backward pass; only plain LoRA is supported", _RETRAIN),
        "megatron_config": ("it adapts Megatron's parallel layers", "convert it to a transformers model"),
        "ensure_weight_tying": ("adapters of tied layers are tied", _RETRAIN),
        "loftq_config": ("LoftQ quantises and rewrites the base", _RETRAIN),
        "corda_config": ("CorDA rewrites the base", "convert it to plain LoRA when saving (PEFT: CorDA)"),
        "lora_ga_config": ("LoRA-GA rewrites the base", "convert it to plain LoRA when saving (PEFT: LoRA-GA)"),
    }
)


@dataclass(frozen=True)
class LoraSettings:
    """The part of a PEFT LoRA configuration that decides which modules are adapted and how strongly.

    Field names are PEFT's, because PEFT's own matching functions read them.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: frozenset[str] | str | None
    exclude_modules: frozenset[str] | str | None
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str
    task_type: str | None

    @property
    def needs_base(self) -> bool:
        """Whether only the base model says which modules are targets ('all-linear', or none given)."""
        targets = self.target_modules
        return targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR)

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts this module path; with `needs_base`, whether it may."""
        config = dataclasses.replace(self, target_modules=frozenset((module,))) if self.needs_base else self
        return bool(check_target_module_exists(config, module))

    def check_work(self, name: str, modules: Iterable[str]) -> None:
        """Refuse patterns that may take hours to match these module paths, before they are.

        Raises:
            ValueError: the field, for the adapter `name`.
        """
        lengths = Counter(map(len, modules))
        for field, patterns in self._patterns().items():
            work = sum(ways_to_match(pattern, lengths) for pattern in patterns)
            if work > MAX_WAYS:
                raise ValueError(
                    f"{name}: {field} may take hours to match: {work:.0e} ways are left by {len(patterns)} patterns "
                    f"and {lengths.total()} module paths of up to {max(lengths)} characters, at most {MAX_WAYS:.0e} "
                    "are tried; list the modules instead"
                )

    def _patterns(self) -> dict[str, list[str]]:
        """Field -> its regular expressions, as PEFT runs them."""
        whole = {
            "target_modules": None if self.needs_base else self.target_modules,
            "exclude_modules": self.exclude_modules,
        }
        return {
            **{field: [value] for field, value in whole.items() if isinstance(value, str)},
            "layers_pattern": [_layer_as_run(pattern) for pattern in self.layers_pattern or ()],
            "rank_pattern": [_key_as_run(key) for key in self.rank_pattern],
            "alpha_pattern": [_key_as_run(key) for key in self.alpha_pattern],
        }

    def rank(self, module: str) -> int:
        """The rank of a module after `rank_pattern`."""
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)

    def scaling(self, module: str) -> float:
        """What B is multiplied by: alpha / r after the patterns, or alpha / sqrt(r) for rsLoRA."""
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module), self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _key_as_run(key: str) -> str:
    """A key of `rank_pattern` or `alpha_pattern` as PEFT matches it."""
    return rf"(.*\.)?({key})$"


def _layer_as_run(pattern: str) -> str:
    """An item of `layers_pattern` as PEFT matches it."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def read_settings(raw: Mapping[str, Any], name: str) -> LoraSettings:
    """Settings of the adapter `name` from the object in its `adapter_config.json`.

    Raises:
        UnsupportedAdapterError: fields whose effect is not plain LoRA, all of them listed.
        ValueError: a field of the wrong type or value.
    """
    refusals = list(_refusals(raw))
    if refusals:
        raise UnsupportedAdapterError("\n".join(f"{name}: {line}" for line in refusals))
    fields = _Fields(name, {**_defaults(), **raw})
    layers = fields.value("layers_to_transform")
    settings = LoraSettings(
        r=fields.positive("r", fields.value("r")),
        lora_alpha=fields.number("lora_alpha", fields.value("lora_alpha")),
        use_rslora=fields.flag("use_rslora"),
        target_modules=fields.names_or_regex("target_modules"),
        exclude_modules=fields.names_or_regex("exclude_modules") or None,
        layers_to_transform=fields.layers((layers,) if type(layers) is int else layers),
        layers_pattern=fields.layer_names("layers_pattern"),
        rank_pattern={k: fields.positive("rank_pattern", v) for k, v in fields.pattern("rank_pattern").items()},
        alpha_pattern={k: fields.number("alpha_pattern", v) for k, v in fields.pattern("alpha_pattern").items()},
        base_model=fields.text("base_model_name_or_path") or "",
        task_type=fields.text("task_type"),
    )
    if isinstance(settings.target_modules, str) and settings.layers_to_transform:
        raise ValueError(f"{name}: layers_to_transform needs target_modules as a list, got a string")
    if settings.layers_pattern and settings.layers_to_transform is None:
        raise ValueError(f"{name}: layers_pattern is set, layers_to_transform is not")
    return settings


def _refusals(raw: Mapping[str, Any]) -> Iterator[str]:
    """One line a field that rules the adapter out: field, value, reason, remedy."""
    if raw.get("peft_type") != "LORA":
        yield f"peft_type={raw.get('peft_type')!r}; only LORA is supported, convert it to plain LoRA"
        return
    init = raw.get("init_lora_weights", True)
    if init is not None and not isinstance(init, bool) and init not in _INITS:
        yield (
            f"init_lora_weights={init!r} rewrites the base weights or is unknown, so B @ A is not the whole update; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA"
        )
    for field, value in raw.items():
        if field in _READ or field in _INERT or _is_neutral(field, value):
            continue
        unknown = ("its effect on the update is unknown", "remove the option, or convert it to plain LoRA")
        reason, remedy = _REFUSED.get(field, unknown)
        yield f"{field}={value!r}: {reason}; {remedy}"


def _is_neutral(field: str, value: Any) -> bool:
    """Whether a field has the value that means "off": PEFT's default, or nothing where the default is nothing."""
    default = _defaults().get(field)
    if type(value) is type(default) and value == default:
        return True
    return not default and (value is None or value is False or (isinstance(value, (str, list, dict)) and not value))


@cache
def _defaults() -> Mapping[str, Any]:
    """Field -> default of the installed PEFT's LoraConfig."""
    config = LoraConfig()
    return MappingProxyType({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


@dataclass(frozen=True)
class _Fields:
    """The fields of one configuration, each taken out with its type checked."""

    name: str
    raw: Mapping[str, Any]

    def value(self, field: str) -> Any:
        return self.raw[field]

    def fail(self, field: str, expected: str, value: Any) -> ValueError:
        return ValueError(f"{self.name}: {field} must be {expected}, got {value!r}")

    def positive(self, field: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self.fail(field, "a positive integer", value)
        return value

    def number(self, field: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= 1e30:
            raise self.fail(field, "a finite number", value)
        return value  # type: ignore[no-any-return]

    def flag(self, field: str) -> bool:
        value = self.raw[field]
        if not isinstance(value, bool):
            raise self.fail(field, "true or false", value)
        return value

    def text(self, field: str) -> str | None:
        value = self.raw[field]
        if value is not None and not isinstance(value, str):
            raise self.fail(field, "a string or null", value)
        return value

    def names_or_regex(self, field: str) -> frozenset[str] | str | None:
        value = self.raw[field]
        if isinstance(value, str):
            return self.regex(field, value)
        return None if value is None else frozenset(self.names(field, value))

    def layer_names(self, field: str) -> tuple[str, ...] | None:
        value = self.raw[field]
        names = self.names(field, [value] if isinstance(value, str) else value or [])
        return tuple(self.regex(field, name, _layer_as_run(name)) for name in names if name) or None

    def names(self, field: str, value: Any) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(field, "a string or a list of strings", value)
        return value

    def layers(self, value: Any) -> tuple[int, ...] | None:
        if not value:
            return None
        if not isinstance(value, (list, tuple)) or not all(type(n) is int and n >= 0 for n in value):
            raise self.fail("layers_to_transform", "a list of layer numbers", value)
        return tuple(value)

    def pattern(self, field: str) -> dict[str, Any]:
        value = self.raw[field]
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fail(field, "an object of name or regex -> number", value)
        for key in value:
            self.regex(field, key, _key_as_run(key))
        return value

    def regex(self, field: str, pattern: str, as_run: str | None = None) -> str:
        try:
            check_pattern(pattern if as_run is None else as_run)
        except ValueError as error:
            raise self.fail(field, f"a safe and valid regular expression ({error})", pattern) from None
        return pattern
