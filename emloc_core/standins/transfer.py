"""Which adapters hold on the base what they learned on its emulator: LoRAs on Linears, and what is trained of the
embeddings and the output layer, which the emulator has from the base as they are.

A Linear's weight differs on the emulator. So nothing may be computed from it, trained of it, or initialised from it.
PEFT checks this where it wraps a model, in any script; see :func:`refuse_others`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from emloc_core.compat.peft import check_adapters
from emloc_core.errors import EmlocError
from emloc_core.standins.expert_loras import compute_apart, expert_modules, make_placeholders, stacks_of
from emloc_core.standins.vocabulary import PackedLayer, vocabulary_layers

#: Fields of LoraConfig that may have any value: they do not change what a trained LoRA computes.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "peft_type",
}  # fmt: skip
#: Fields that determine the scale of a LoRA.
SCALE = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
#: Fields that name whole modules, or rows of them: token embeddings and output layer alone.
DENSE = {"modules_to_save", "trainable_token_indices"}
#: Fields with other safe values than the default.
_SAFE_VALUES: dict[str, tuple[Any, ...]] = {"init_lora_weights": (True, False, "gaussian", "orthogonal")}
#: Why a field's other values are refused, if there is a better reason than that they are not known to be safe.
_WHY = {
    "use_dora": "DoRA rescales the weight, which differs on the emulator",
    "init_lora_weights": "this initialisation reads or splits the weight, which is a factor on the emulator",
    "bias": "trained biases belong to the emulator",
    "lora_bias": "a trained bias belongs to the emulator",
    "kasa_config": "KaSA changes the weight by its singular values, which differ on the emulator",
}
REMEDY = "Train an ordinary LoRA, without these settings."


def field_problems(config: Mapping[str, Any]) -> list[str]:
    """Return the reasons why an adapter with this PEFT config cannot be transferred; empty if it can.

    An allowlist: a field or value that is not known to be safe is a problem.
    """
    from peft import LoraConfig

    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"it is a {getattr(kind, 'value', kind)}, and only a LoRA can be transferred"]
    defaults = LoraConfig().to_dict()
    problems = []
    for name, value in config.items():
        safe = value in _SAFE_VALUES.get(name, ()) or not (value or defaults.get(name))
        if safe or name in _FREE | SCALE | DENSE:
            continue
        if name not in defaults or value != defaults[name]:
            why = _WHY.get(name, "it is not known to be safe")
            problems.append(f"{name}={value!r} cannot be transferred ({why})")
    return problems


def module_problems(config: Mapping[str, Any], model: nn.Module, packed: Collection[str] = ()) -> list[str]:
    """Return the reasons why modules that this PEFT config trains themselves cannot be transferred.

    Args:
        model: the one to wrap; its weights may be on the meta device.
        packed: paths of its layers that are packed in the emulator, where the model here has none.
    """
    dense = vocabulary_layers(model)  # what may be trained itself
    packed = {*packed, *(path for path, module in dense.items() if isinstance(module, PackedLayer))}
    tokens = config.get("trainable_token_indices") or {}

    def named(ends: Iterable[str]) -> set[str]:
        return {path for path, _ in model.named_modules() for end in ends if f".{path}".endswith(f".{end}")}

    saved = named(config.get("modules_to_save") or [])
    rows = named(tokens if isinstance(tokens, Mapping) else [*dense][:1])  # by themselves, those of the embeddings
    paths = sorted(saved | rows)
    if packed and any(path in dense for path in paths):
        return [f"{' and '.join(sorted(packed))} cannot be trained while packed; make the emulator with --keep head"]
    wrong = [path for path in paths if path not in dense]
    if not wrong and {id(dense[path].weight) for path in saved} & {id(dense[path].weight) for path in rows}:
        return ["one matrix, as tied layers have, is trained by modules_to_save or trainable_token_indices, not both"]
    may = f"only {' and '.join(dense)} can be trained themselves" if dense else "no module can be trained itself"
    return [f"{path} differs between the emulator and the base; {may}" for path in wrong[:1]]


def stack_problems(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return the reasons why parameters that this PEFT config puts a LoRA on cannot have one: all but whole experts."""
    wanted = config.get("target_parameters") or []
    stacks = {f"{path}.{name}" for path, experts in expert_modules(model) for name in stacks_of(experts)}
    wrong = sorted(name for name in wanted if not any(f".{path}".endswith(f".{name}") for path in stacks))
    return [f"{name} is not a stack of experts, the only parameters that can have a LoRA" for name in wrong[:1]]


def refuse_others(is_emulator: Callable[[nn.Module], bool]) -> None:
    """Have PEFT refuse, where it wraps an emulator, what could not be transferred later; see also `expert_loras`."""

    def check(model: nn.Module, config: dict[str, Any]) -> None:
        if is_emulator(model):
            require(field_problems(config) or module_problems(config, model) or stack_problems(config, model))
            if config.get("target_parameters"):
                make_placeholders(model)

    check_adapters(check, compute_apart)


def require(problems: Iterable[str]) -> None:
    """Refuse an adapter that has problems."""
    if reasons := "; ".join(problems):
        raise EmlocError(
            f"What is trained on an emulator has to hold on the base: {reasons}.", REMEDY, code="unsupported"
        )
