"""The planned memory of an exact step: as many hidden states as really pass through every tower."""

from pathlib import Path

import pytest
import torch
from support.planned import CASES, TINY, label

from emloc_core.conformance.tiny import TinyModel, on_meta, random_model, tiny_config
from emloc_core.emulator.declared import find_linears
from emloc_core.exact.memory import step_need
from emloc_core.family import Family
from emloc_core.model.blocks import block_paths
from emloc_core.model.image_shape import count_patches
from emloc_core.model.inside import Positions
from emloc_core.standins import NF4


@pytest.mark.parametrize(("family", "settings"), CASES, ids=label)
def test_boundaries_are_the_hidden_states_that_pass(family: Family, settings: dict, tmp_path: Path) -> None:
    tiny = TinyModel(family, settings, "tiny", tmp_path)
    family, model = tiny.family, random_model(tiny.family, tiny.config)
    inputs = tiny.samples[-1].inputs("cpu")
    seen = dict.fromkeys(block_paths(model, family), torch.empty(0))
    for path in seen:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: seen.update({path: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(**inputs)
    by_tower = [[seen[path] for path in seen if path.startswith(f"{tower.blocks}.")] for tower in family.towers]
    passing = sum(states[0].nbytes * (len(states) + 2) for states in by_tower)

    pixels = inputs.get("pixel_values")
    patches = 0 if pixels is None else count_patches(pixels.shape, model.config)
    tokens = inputs["input_ids"].numel()
    need = step_need(model, family, Positions(tokens, tokens), Positions(patches, patches), torch.float32)
    assert need["boundaries"] + need["ends"] == passing
    assert not need["unpacked"]
    twice = step_need(model, family, Positions(2 * tokens, tokens), Positions(2 * patches, patches), torch.float32)
    assert twice["boundaries"] + twice["ends"] == 2 * passing
    assert {name: size for name, size in twice.items() if name not in ("boundaries", "ends")} == {
        name: size for name, size in need.items() if name not in ("boundaries", "ends")
    }


def test_a_token_passes_through_the_experts_that_it_is_sent_to() -> None:
    sizes = next(settings for _, settings in TINY if "moe_intermediate_size" in settings)
    family = next(family for family, settings in TINY if settings is sizes)

    def activations(chosen: int) -> int:
        settings = sizes | {"num_experts_per_tok": chosen, "mlp_only_layers": []}
        model = on_meta(family, tiny_config(settings))
        return step_need(model, family, Positions(8, 4), Positions(0, 0), torch.float32)["activations"]

    hidden, inner = sizes["hidden_size"], sizes["moe_intermediate_size"]
    one, two = activations(1), activations(2)
    assert two - one == 4 * 2 * 4 * ((hidden + 2 * inner) + (inner + hidden))  # fp32, and twice, for 4 tokens


def test_a_packed_matrix_is_unpacked_one_at_a_time() -> None:
    family, settings = TINY[0]
    model, positions = on_meta(family, tiny_config(settings)), Positions(8, 8)
    dense = step_need(model, family, positions, positions, torch.float32)
    linears = find_linears(model, family).linears
    NF4().replace(model, {linear.path: 0 for linear in linears})
    need = step_need(model, family, positions, positions, torch.float32)
    assert need["unpacked"] == 4 * max(linear.numbers for linear in linears)
    assert need["weights"] < dense["weights"] / 3
