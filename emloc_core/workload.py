"""What is planned for when the user does not say: stage 2's own batch, TRL's own length, one image."""

from pathlib import Path

from transformers import AutoTokenizer

from emloc_core.calibration import model_limit, tokenize
from emloc_core.data import load_rows
from emloc_core.errors import EmlocError
from emloc_core.memory import Workload
from emloc_core.output import read_object
from emloc_core.plugins import plugin_manager
from emloc_core.skeleton import read_config
from emloc_core.training import TrainSettings

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
    data: str | None = None,
    split: str = "train",
) -> Workload:
    """Return the workload to plan for.

    Args:
        config_file: the model's; with ``data`` its tokenizer lies beside it.
        train: the settings of stage 2; the batch size is taken from them.
        device: ``cuda`` or ``cpu``.
        length: tokens a row; with ``data``, where rows are cut. 1024 without either, or the model's limit.
        images: images a row; by default 1 for an image-text model, and none with ``data``, whose rows are text.
        image_size: height and width of an image in pixels, where the model takes any.
        data: rows, of which the longest says the length.
        split: of a data set of the hub.

    Raises:
        EmlocError: there is no tokenizer, or a row does not suit it.
    """
    config = read_config(config_file)
    limit = model_limit(config)
    if data is not None:
        length = _longest(config_file, data, split, length, limit)
    if length is not None and limit is not None and length > limit:
        raise EmlocError(f"The model takes {limit} tokens, not {length}.", f"Give a length of at most {limit}.")
    if images is None:
        family = plugin_manager().family_for(read_object(config_file))
        images = int(data is None and family.modality == "image-text")
    length = length or min(LENGTH, limit or LENGTH)
    return Workload(train.batch_size, length, images, train, device, image_size)  # type: ignore[arg-type]


def _longest(config_file: Path, data: str, split: str, cut: int | None, limit: int | None) -> int:
    try:
        tokenizer = AutoTokenizer.from_pretrained(config_file.parent, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise EmlocError(
            f"--data needs the model's tokenizer, and {config_file.parent} has none.",
            "Give a whole model directory, or say the length with --length.",
        ) from error
    return max(len(tokenize(row, tokenizer, cut, limit).input_ids) for row in load_rows(data, split))
