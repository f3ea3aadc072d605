"""A plugin's declaration of an architecture. Data, not code; imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from reprlib import Repr
from typing import Any, Literal

#: Sizes of a tiny model under the names that most configs have: ``{"model_type": "my_model", **TINY}``.
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: How :func:`require_types` checks a declaration.
CHECKED = {"strict": True, "revalidate_instances": "always"}
_SHORT = Repr()
_SHORT.maxother = _SHORT.maxstring = 80  # characters of one value


@dataclass(frozen=True)
class Tower:
    """One stack of repeated layers.

    Attributes:
        name: for example ``language`` or ``vision``.
        blocks: module path of the list of blocks, in execution order (``model.layers``).
        input_groups: paths of Linears within a block. The Linears of one group read the same input, so their
            statistics are gathered once. Every compressed Linear is in exactly one group; paths that a given model
            lacks are ignored.
        experts: paths within a block of modules that hold fused experts, as transformers marks them, in two stacks of
            matrices: ``gate_up_proj`` (or ``up_proj``) and ``down_proj``. A LoRA is never put on them.
        lora_targets: modules that a LoRA is put on by default: ends of their paths, long enough to be unambiguous.
            None means the last part of every path in ``input_groups``; an empty sequence, that the tower gets none.
    """

    __pydantic_config__ = CHECKED

    name: str
    blocks: str
    input_groups: Sequence[Sequence[str]]
    lora_targets: Sequence[str] | None = None
    experts: Sequence[str] = ()

    def targets(self) -> set[str]:
        """Return the default targets of a LoRA: ends of module paths."""
        if self.lora_targets is not None:
            return set(self.lora_targets)
        return {path.rpartition(".")[2] for group in self.input_groups for path in group}


@dataclass(frozen=True)
class Family:
    """An architecture, or several with the same declaration.

    Attributes:
        name: the family's name, unique among the installed plugins.
        model_types: values of ``model_type`` in ``config.json`` that the declaration covers.
        towers: the stacks of blocks, in execution order.
        auto_class: the transformers class that builds the model.
        modality: what the model reads, ``text`` or ``image-text``; or ``text-to-image``, if it makes pictures.
        objective: what its models learn: ``tokens``, or one that a plugin provides (``emloc_objectives``).
        keep_dense: glob patterns of module paths that are never compressed, each with its reason.
        nested: models of other families inside this one: part of the config (``text_config``) -> module path
            (``model.language_model``) that replaces the first part of the other family's block paths, usually
            ``model``. The other family's towers follow this family's own; its ``keep_dense`` applies to its part.
        tiny_configs: keyword arguments of ``AutoConfig.for_model`` for tiny models that the conformance kit builds, at
            least one per model type.
        tiny_inputs: given a tiny model's config, returns the keyword arguments of a forward pass of one row with an
            image, if the conformance kit cannot make them up: tensors, including ``input_ids`` of shape (1, T).
        observed: records of what was observed because no plugin declares it (:mod:`emloc_core.observed.record`); they
            go into the ``emloc.json`` of everything that is made with the family.
    """

    __pydantic_config__ = CHECKED

    name: str
    model_types: frozenset[str] | set[str]
    towers: Sequence[Tower]
    auto_class: str = "AutoModelForCausalLM"
    modality: Literal["text", "image-text", "text-to-image"] = "text"
    objective: str = "tokens"
    keep_dense: Mapping[str, str] = field(default_factory=dict)
    nested: Mapping[str, str] = field(default_factory=dict)
    tiny_configs: Sequence[Mapping[str, Any]] = ()
    tiny_inputs: Callable[[Any], Mapping[str, Any]] | None = None
    observed: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def with_nested(self, inner: "Family", path: str) -> "Family":
        """Return the family with the declaration of ``inner`` added; its model without head is at ``path`` here.

        In ``inner`` itself, that model is the first part of its block paths, such as ``model`` or ``gpt_neox``.
        """
        bases = {tower.blocks.partition(".")[0] for tower in inner.towers}

        def moved(name: str) -> str:
            base, dot, rest = name.partition(".")
            return f"{path}.{rest}" if dot and base in bases else name

        return replace(
            self,
            towers=[*self.towers, *(replace(tower, blocks=moved(tower.blocks)) for tower in inner.towers)],
            keep_dense={**{moved(pattern): reason for pattern, reason in inner.keep_dense.items()}, **self.keep_dense},
            nested={},
            observed=(*self.observed, *inner.observed),
        )

    def lora_targets(self) -> list[str]:
        """Return the default ``target_modules`` of a LoRA: ends of module paths."""
        return sorted(set().union(*(tower.targets() for tower in self.towers)))


def require_types(declared: Any) -> None:
    """Check all fields of a declaration, such as a Family, against the types of its dataclass.

    Raises:
        TypeError: a field has another type; names the first such field.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(type(declared)).validate_python(declared)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field_path, value = ".".join(map(str, wrong["loc"])), _SHORT.repr(wrong["input"])
        kind = type(declared).__name__.lower()
        raise TypeError(f"the {kind} {declared.name!r} has {field_path} = {value}. {wrong['msg']}") from None
