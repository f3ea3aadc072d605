"""What is planned for when the user does not say: stage 2's own batch, TRL's own length, one image."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import Sample, load_processing, model_limit, tokenize
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import read_config_json
from emloc_core.files.pretrained import load_config
from emloc_core.memory.model import Workload
from emloc_core.model.image_shape import image_shape
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import Rows
from emloc_core.settings import TrainSettings

#: Where TRL's ``SFTConfig`` cuts rows by default.
LENGTH = 1024


def make_workload(
    config_file: Path,
    train: TrainSettings,
    device: str = "cuda",
    *,
    length: int | None = None,
    images: int | None = None,
    image_size: tuple[int, int] | None = None,
    data: Rows | None = None,
    split: str = "train",
) -> Workload:
    """Return the workload to plan for.

    Args:
        config_file: the model's; with ``data`` its tokenizer, or its processor, lies beside it.
        train: the settings of stage 2; the batch size is taken from them.
        device: ``cuda`` or ``cpu``.
        length: tokens a row; with ``data``, where rows are cut. 1024 without either, or the model's limit.
        images: images a row, or tiles of images; by default those of the rows, or 1 for an image-text model.
        image_size: height and width of an image in pixels, where the model takes any; by default that of the rows.
        data: rows, of which the longest says the length, and the one with most pixels the images.
        split: of a data set of the hub.

    Raises:
        EmlocError: there is no tokenizer, or a row does not suit it.
    """
    family = plugin_manager().family_for(read_config_json(config_file))  # first: it knows foreign layouts
    config = load_config(config_file)
    limit = model_limit(config)
    counted = int(family.modality == "image-text")
    if data is not None:
        rows = load_rows(data, split)
        processing = load_processing(config_file.parent, family, rows)
        length, counted, largest = _measure((tokenize(row, processing, length, limit) for row in rows), config)
        if images is None and image_size is None and largest is not None:
            image_size = largest
            length = max(length, counted * image_shape(config_file, config, image_size).tokens + 1)
    if length is not None and limit is not None and length > limit:
        raise EmlocError(f"The model takes {limit} tokens, not {length}.", f"Give a length of at most {limit}.")
    length = length or min(LENGTH, limit or LENGTH)
    return Workload(train.batch_size, length, counted if images is None else images, train, device, image_size)  # type: ignore[arg-type]


def _measure(samples: Iterable[Sample], config: Any) -> tuple[int, int, tuple[int, int] | None]:
    """Return the longest row's tokens; and of the row with most pixels, the number of images and their size.

    Images that are cut into tiles of one size count as their tiles, and None is their size. Of images of any size, so
    many of the largest one are counted as hold all of the row's pixels; its height and width are in pixels.
    """
    length, most = 0, None
    for sample in samples:
        length = max(length, len(sample.input_ids))
        pixels = sample.others.get("pixel_values")
        if pixels is not None and any(sample.completion_mask):  # a row that stage 2 does not drop
            most = max((sample.others, most or sample.others), key=lambda others: others["pixel_values"].numel())
    if most is None:
        return length, 0, None
    if "image_grid_thw" not in most:
        return length, len(most["pixel_values"]), None
    patches = most["image_grid_thw"].prod(dim=1)
    _, height, width = most["image_grid_thw"][patches.argmax()].tolist()
    side = config.vision_config.patch_size
    return length, -(-int(patches.sum()) // int(patches.max())), (height * side, width * side)
