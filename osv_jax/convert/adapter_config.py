"""What PEFT's adapter_config.json says of a LoRA's tensors.

Every field that PEFT 0.21's `LoraConfig` has is one of three here: honoured (`AdapterConfig`), without effect on what
the tensors add to a UNet (`_NO_EFFECT`), or, if it is on, refused by name: what it stands for is more than a LoRA.
"""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from osv_jax.errors import UserError
from osv_jax.runtime.ranges import COUNT, POSITIVE

# Where it comes from, and how it was trained. Configs of initialisations count only through `init_lora_weights`, the
# group size only through `use_qalora`; `fan_in_fan_out` is of GPT-2's layers; a UNet has no weights that are tied.
_NO_EFFECT = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "lora_dropout", "fan_in_fan_out", "ensure_weight_tying", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    )
)
# Of `init_lora_weights`: those that leave the kernels as they are. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not: they
# train beside kernels from which the first A B has been taken, which the adapter does not hold.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_ALL_LINEAR = "all-linear"
# Fields that may be one value or a list of them, and of what.
_SEVERAL = {"target_modules": str, "exclude_modules": str, "layers_to_transform": int, "layers_pattern": str}

# A regular expression, or whole names and last parts of names.
Modules = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields that are honoured, with PEFT's names and defaults.

    Attributes:
        r, lora_alpha: rank and alpha of the modules that no pattern covers.
        use_rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
        rank_pattern, alpha_pattern: regular expressions for the ends of modules' names -> rank, alpha.
        target_modules, exclude_modules: which modules have a LoRA; without targets, those that the file covers.
        layers_to_transform: only those with one of these numbers; empty for all.
        layers_pattern: after which parts of a name that number is looked for; empty for any.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_modules: Modules = None
    exclude_modules: Modules = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def rank(self, module: str) -> int:
        """The rank of a module, by its PyTorch name."""
        return _first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What its product A B is multiplied by."""
        rank = self.rank(module)
        return _first_match(self.alpha_pattern, module, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def covers(self, module: str) -> bool:
        """Whether PEFT would give the module a LoRA (`peft.tuners.tuners_utils.check_target_module_exists`)."""
        if _is_among(module, self.exclude_modules):
            return False
        if self.target_modules in (None, _ALL_LINEAR):
            return True
        if not _is_among(module, self.target_modules):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules or not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = [match for pattern in patterns if (match := re.match(rf"{pattern}\.(?P<layer>\d+)\.", module))]
        return bool(found) and int(found[0]["layer"]) in self.layers_to_transform


def parse_adapter_config(fields: Mapping[str, Any], source: Any) -> AdapterConfig:
    """Reads what adapter_config.json, or the metadata of a file, says.

    Args:
        source: what messages call it.

    Raises:
        UserError: another kind of adapter, a field that is on and is not honoured here, or a value that no LoRA has.
    """
    if (kind := fields.get("peft_type", "LORA")) != "LORA":
        raise UserError(f"{source} is of a {kind} adapter: only LORA can be used.")
    honoured = {field.name for field in dataclasses.fields(AdapterConfig)}
    for name, value in fields.items():
        if name == "init_lora_weights":
            _check_init(value, source)
        elif name not in honoured | _NO_EFFECT and value and (name, value) != ("bias", "none"):
            raise UserError(
                f"{source} has {name}={reprlib.repr(value)}, with which the adapter is more than its LoRA, or which is"
                " not known here: merge it into the UNet with PEFT (merge_and_unload) and convert that."
            )
    # Null is what other fields are at their default.
    given = {name: fields[name] for name in honoured if fields.get(name) is not None}
    _check_numbers(given | {name: fields[name] for name in ("r", "lora_alpha") if name in fields}, source)
    for name, kind in _SEVERAL.items():
        # (A string of modules is one expression, which PEFT tells from a list of one name.)
        if name in given and not (name.endswith("modules") and isinstance(given[name], str)):
            given[name] = _all_of(kind, given[name], f"{source}: {name}")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(given.get(name), str):
            _check_expression(f"{source}: {name}", given[name])
    for pattern in given.get("layers_pattern", ()):
        _check_expression(f"{source}: layers_pattern", pattern)
    return AdapterConfig(**given)


def _check_init(value: Any, source: Any) -> None:
    if (value.lower() if isinstance(value, str) else value) not in _PLAIN_INITS:
        raise UserError(
            f"{source} has init_lora_weights={reprlib.repr(value)}, with which the adapter is for kernels that were"
            " changed before training: save it in PEFT with path_initial_model_for_weight_conversion, or merge it into"
            " the UNet (merge_and_unload) and convert that."
        )


def _check_numbers(given: Mapping[str, Any], source: Any) -> None:
    for name, allowed in (("r", COUNT), ("lora_alpha", POSITIVE)):
        if name in given:
            allowed.check(f"{source}: {name}", given[name])
    if not isinstance(given.get("use_rslora", False), bool):
        raise UserError(f"{source}: use_rslora={given['use_rslora']!r} must be true or false.")
    for name, allowed in (("rank_pattern", COUNT), ("alpha_pattern", POSITIVE)):
        patterns = given.get(name, {})
        if not isinstance(patterns, Mapping):
            raise UserError(f"{source}: {name}={reprlib.repr(patterns)} must map modules to numbers.")
        for pattern, value in patterns.items():
            allowed.check(f"{source}: {name}: {pattern}", value)
            _check_expression(f"{source}: {name}", _ending(pattern))


def _all_of(kind: type, value: Any, name: str) -> tuple[Any, ...]:
    """One value or a list of them, as a tuple."""
    values = value if isinstance(value, list) else [value]
    if not all(type(x) is kind for x in values):
        wanted = "names of modules" if kind is str else "numbers of layers"
        raise UserError(f"{name}={reprlib.repr(value)} must be {wanted}.")
    return tuple(values)


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{name} has {expression!r}, which is no regular expression ({error}).") from error


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule, `peft.utils.other.get_pattern_key`."""
    return next((value for pattern, value in patterns.items() if re.match(_ending(pattern), module)), default)


def _is_among(module: str, modules: Modules) -> bool:
    if not modules:
        return False
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return module in modules or module.endswith(tuple(f".{name}" for name in modules))
