"""A tiny InternVL with its processor, and rows with pictures, built without a hub."""

from pathlib import Path

import torch
from conftest import tiny_tokenizer, write_jsonl
from emloc_internvl import INTERNVL
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
)

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "white": (245, 245, 245)}
#: One placeholder a picture, as the processor expands it; contents are strings or parts.
IMAGE_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image_context>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_processor(image_size: int = 8, image_seq_length: int = 4) -> InternVLProcessor:
    """InternVL's processor with the tiny tokenizer; its image token is 127, as in the tiny configs."""
    named = {
        "start_image_token": "<image_start>",
        "end_image_token": "<image_end>",
        "video_token": "<video>",
        "context_image_token": "<image_context>",
    }
    size = {"height": image_size, "width": image_size}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=tiny_tokenizer(128 - len(named), extra_special_tokens=named),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=image_seq_length,
        chat_template=IMAGE_CHAT_TEMPLATE,
    )


def save_tiny_internvl(directory: Path) -> Path:
    """Save a tiny InternVL with its processor: fp32, seeded random weights."""
    config = AutoConfig.for_model(**INTERNVL.tiny_configs[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory


def write_picture_rows(directory: Path) -> Path:
    """Write 24 distinct conversations about one or two flat pictures as ``rows.jsonl``, the PNG files beside it."""
    (directory / "pictures").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(directory / "pictures" / f"{name}.png")
    combinations = [(name,) for name in COLOURS] + [(one, other) for one in COLOURS for other in COLOURS]
    rows = [
        {
            "images": [f"pictures/{name}.png" for name in names],
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": names[-1]},
            ],
        }
        for names in combinations
        for question in (["which colour?", "colour of it:"] if len(names) == 1 else ["which colour is the last?"])
    ]
    return write_jsonl(directory / "rows.jsonl", rows)
