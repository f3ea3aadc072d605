"""Tiny models for images and text with their real processors, and rows with pictures to ask about."""

import json
from pathlib import Path

import numpy
import torch
from PIL import Image
from support.models import tiny_tokenizer
from support.rows import COLOURS, write_jsonl
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from emloc_core.family import Family

#: As the templates of the real models: a string, or parts in their order.
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% elif 'text' in part %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
RGB = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20), "black": (0, 0, 0),
       "white": (255, 255, 255), "brown": (140, 80, 20), "grey": (128, 128, 128), "pink": (250, 150, 190),
       "gold": (240, 200, 40), "teal": (20, 130, 130)}  # fmt: skip


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": list(special.values())})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=special,
    )


def internvl_processor(max_patches: int = 3) -> InternVLProcessor:
    """Pictures become tiles of 8 x 8 pixels, four tokens each."""
    tokenizer = _tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<context>", video_token="<video>"
    )
    pixels = GotOcr2ImageProcessor(size={"height": 8, "width": 8}, max_patches=max_patches)
    template = TEMPLATE.replace("IMAGE", "<context>")
    return InternVLProcessor(pixels, tokenizer, InternVLVideoProcessor(), 4, chat_template=template)


def qwen_processor() -> Qwen2_5_VLProcessor:
    """Pictures become patches of 2 x 2 pixels, four of them a token."""
    tokenizer = _tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    sizes = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}
    pixels = Qwen2VLImageProcessor(size={"shortest_edge": 16, "longest_edge": 256}, **sizes)
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen2_5_VLProcessor(pixels, tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template)


def save_model(
    directory: Path, family: Family, model_type: str, processor: ProcessorMixin, dtype: torch.dtype = torch.float32
) -> Path:
    """Save a family's tiny model of a type with seeded random weights, and its processor."""
    settings = json.loads(json.dumps(next(c for c in family.tiny_configs if c["model_type"] == model_type)))
    settings["image_token_id"] = processor.image_token_id
    settings["text_config"]["vocab_size"] = len(processor.tokenizer)
    for name in ("video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if name in settings:
            settings[name] = getattr(processor.tokenizer, name)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def picture(colours: list[str], size: int = 8) -> Image.Image:
    """Squares of these colours side by side, with some noise: else a picture has hardly more ranks than colours."""
    pixels = numpy.concatenate([numpy.full((size, size, 3), RGB[colour]) for colour in colours], axis=1)
    noise = numpy.random.default_rng(sum(pixels.flat)).normal(0, 40, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(numpy.uint8))


def picture_rows(directory: Path, *, text_rows: bool = True) -> Path:
    """Write 100 rows with two colours to name, and ten without a picture; return the file."""
    (directory / "pictures").mkdir(parents=True)
    rows = []
    for first in COLOURS:
        for second in COLOURS:
            name = f"pictures/{first}-{second}.png"
            picture([first, second]).save(directory / name)
            rows.append(conversation("which colours?", f"{first} and {second}.") | {"images": [name]})
    if text_rows:
        rows += [conversation(f"write {colour}.", f"{colour}.") | {"images": []} for colour in COLOURS]
    return write_jsonl(directory / "rows.jsonl", rows)


def conversation(question: str, answer: str) -> dict:
    """One turn each."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
