"""The families in the tree, on tiny models: the declaration fits, and a streamed forward equals the whole one."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from emloc_core.checkpoint import Checkpoint
from emloc_core.plan import make_plan
from emloc_core.plugins import plugin_manager
from emloc_core.skeleton import Skeleton
from emloc_core.streaming import Stream

TINY = [config for family in plugin_manager().families() for config in family.tiny_configs]


@pytest.fixture(params=TINY, ids=lambda config: config["model_type"])
def saved(request, tmp_path):
    """A tiny model on disk, its family, and the whole model in memory."""
    family = plugin_manager().family_for(request.param)
    settings = dict(request.param)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.auto_class).from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():  # no weight may hide by being zero or one
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return Skeleton(Checkpoint(tmp_path), family), family, model


def inputs(model, length: int, *, image: bool) -> dict[str, torch.Tensor]:
    """Return token ids, with a picture among them where the model takes one."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 120, (1, length), generator=generator)
    if not image:
        return {"input_ids": ids}
    config = model.config
    ids[0, 2 : 2 + config.image_seq_length] = config.image_token_id
    size = config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, *size, generator=generator)}


def test_every_linear_of_the_blocks_is_in_the_plan(saved):
    skeleton, family, model = saved
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    planned = {linear.path for linear in make_plan(skeleton.model, family, 0.5).linears}
    dense = {name for name in linears if name == "lm_head" or ".multi_modal_projector." in f".{name}"}
    assert planned == linears - dense


def test_streamed_logits_equal_those_of_the_whole_model_bit_for_bit(saved):
    skeleton, family, model = saved
    images = [False, family.modality == "image-text"]
    rows = [inputs(model, length, image=image) for length, image in zip((9, 21), images, strict=True)]
    stream = Stream(skeleton, [tower.blocks for tower in family.towers])
    forwards = [lambda row=row: skeleton.model(**row, use_cache=False).logits for row in rows]
    with torch.no_grad():
        for row, logits in zip(rows, stream.run(forwards), strict=True):
            assert torch.equal(logits, model(**row, use_cache=False).logits)
