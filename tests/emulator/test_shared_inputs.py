"""A model that takes another branch than the one its family was declared on is refused, not fitted to wrong inputs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.jobs import compress_job, train_job
from support.models import save_tiny_model
from torch import nn

from emloc_core.emulator.forwards import requiring_shared_inputs
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.family import TINY, Family, Tower
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings, TrainSettings

GROUPS = [["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"]]
#: As it looks where attention and MLP are parallel.
FALCON = Family(
    name="falcon",
    model_types=frozenset({"falcon"}),
    towers=[Tower("language", "transformer.h", GROUPS)],
    keep_dense={"lm_head": "each of its outputs is a token's logit"},
)
SIZES = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "alibi": False, "new_decoder_architecture": False}
SETTINGS = CompressSettings(samples=4, selection=2, ratio=0.5, allocator="uniform")


@pytest.fixture(scope="module", params=[True, False], ids=["parallel", "serial"])
def falcon(request, tmp_path_factory):
    """A tiny Falcon of either branch."""
    settings = {"model_type": "falcon", **SIZES, "parallel_attn": request.param}
    return request.param, save_tiny_model(settings, tmp_path_factory.mktemp("falcon") / "base")


def compress(falcon, rows_file, output, family=FALCON, calibration="base"):
    with plugin_manager().declaring(family):
        settings = SETTINGS.model_copy(update={"calibration": calibration})
        return compress_job(falcon, rows_file, output, settings).run()


@pytest.mark.parametrize("calibration", ["base", "propagated"])
def test_linears_of_a_group_that_read_different_inputs_are_refused(falcon, rows_file, tmp_path, calibration):
    parallel, base = falcon
    if parallel:
        assert compress(base, rows_file, tmp_path / "emulator", calibration=calibration)
        return
    with pytest.raises(EmlocError, match="read the same input, and in this model they do not") as caught:
        compress(base, rows_file, tmp_path / "emulator", calibration=calibration)
    assert "transformer.h.0.self_attention.query_key_value and transformer.h.0.mlp.dense_h_to_4h" in str(caught.value)
    assert caught.value.code == "plugin"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_groups_of_their_own_are_right_in_both_branches(falcon, rows_file, tmp_path):
    apart = [[path] for group in GROUPS for path in group]
    apart = [apart[0], apart[2], apart[1], apart[3]]
    family = replace(FALCON, towers=[Tower("language", "transformer.h", apart)])
    assert compress(falcon[1], rows_file, tmp_path / "emulator", family)


@pytest.mark.parametrize("path", ["mlp.dense_h_to_4h", "input_layernorm"])
def test_a_declaration_is_held_against_the_users_model_before_it_is_tuned(falcon, rows_file, tmp_path, path):
    """The tiny models of the kit need not be like this one: a Linear in two groups, or what is no Linear here."""
    tower = Tower("language", "transformer.h", [*GROUPS, [path]])
    with plugin_manager().declaring(replace(FALCON, towers=[tower])), pytest.raises(EmlocError) as caught:
        train_job(falcon[1], rows_file, tmp_path / "adapter", TrainSettings(steps=1))
    assert caught.value.code == "plugin"


class Late(nn.Module):
    """Two Linears that read one tensor, or equal ones, in all rows but the third, where it has changed in between."""

    def __init__(self, change):
        super().__init__()
        self.one, self.other, self.change = nn.Linear(4, 4), nn.Linear(4, 4), change

    def forward(self, x):
        output = self.one(x)
        return output + self.other(self.change(x) if len(x) == 3 else x.view_as(x))


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x.mul_(2)], ids=["another", "in place"])
def test_every_row_is_looked_at(change):
    model = nn.ModuleDict({"block": Late(change)})
    group = ("block.one", "block.other")
    planned = [LinearPlan(path, "block", group, 4, 4, None, "input") for path in group]
    stream = SimpleNamespace(skeleton=SimpleNamespace(model=model), sample=0)

    def run(lengths):
        with torch.no_grad(), requiring_shared_inputs(stream, planned, FALCON):
            for stream.sample, length in enumerate(lengths):
                model["block"](torch.randn(length, 4))

    run([1, 2, 4])
    with pytest.raises(EmlocError, match=r"block\.one and block\.other read the same input"):
        run([1, 2, 4, 3])
