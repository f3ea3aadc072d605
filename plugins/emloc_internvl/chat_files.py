"""The files of InternVL's processor: tiling, image tokens, and the chat template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_core.files.documents import read_object
from emloc_internvl.internlm2 import tokenizer_files
from emloc_internvl.tokens import require_token

#: ImageNet's statistics, with which the source's code normalises images, whatever its preprocessor_config.json says.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BICUBIC = 3


#: What the source's conversation templates, all ChatML, write after every message.
TEMPLATES = {"internvl2_5": "<|im_end|>\n", "internlm2-chat": "<|im_end|>", "Hermes-2": "<|im_end|>"}
#: The processor finds its tokens under these names.
_NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def native_files(chat: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any] | str | None]:
    """Return the files of the native processor and tokenizer, by name.

    Args:
        chat: the source's config, defaults filled in.
        directory: directory of the source.

    Raises:
        EmlocError: the tokenizer's files are missing or lack a token.
    """
    for token in ("<img>", "</img>", "<IMG_CONTEXT>"):
        require_token(directory, token)
    is_internlm2 = chat["llm_config"]["model_type"] == "internlm2"
    files = tokenizer_files(directory) if is_internlm2 else {}
    converted = files.get("tokenizer_config.json")
    settings = converted if isinstance(converted, dict) else read_object(directory / "tokenizer_config.json")
    begins = settings.get("add_bos_token", is_internlm2)
    generation = directory / "generation_config.json"
    return {
        **files,
        "tokenizer_config.json": _tokenizer_config(settings),
        "processor_config.json": _processor_config(chat),
        "preprocessor_config.json": None,
        "chat_template.jinja": chat_template(TEMPLATES[chat["template"]], chat.get("system_message"), begins=begins),
        "generation_config.json": {
            **(read_object(generation) if generation.is_file() else {}),
            "eos_token_id": require_token(directory, "<|im_end|>"),  # where the source's own chat() stops
        },
    }


def _tokenizer_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    config = {name: value for name, value in settings.items() if name not in ("auto_map", "chat_template")}
    if isinstance(tokens := config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = tokens
    return {**config, "extra_special_tokens": _NAMED_TOKENS, "processor_class": "InternVLProcessor"}


def _processor_config(chat: Mapping[str, Any]) -> dict[str, Any]:
    vision = chat["vision_config"]
    size = vision["image_size"]
    pixels = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    return {
        "processor_class": "InternVLProcessor",
        "image_seq_length": tokens_a_tile(chat),
        "image_processor": {
            **pixels,
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": bool(chat["dynamic_image_size"]),
            "min_patches": chat["min_dynamic_patch"],
            "max_patches": chat["max_dynamic_patch"],
        },
        "video_processor": {**pixels, "video_processor_type": "InternVLVideoProcessor"},
    }


def tokens_a_tile(chat: Mapping[str, Any]) -> int:
    """Return how many tokens of the language model an image's tile becomes."""
    vision = chat["vision_config"]
    return round((vision["image_size"] // vision["patch_size"] * chat["downsample_ratio"]) ** 2)


def chat_template(end: str, system_message: str | None, *, begins: bool) -> str:
    """Return the Jinja template of the conversations that the model was tuned on.

    Args:
        end: text after every message.
        system_message: for conversations without one. None writes none, as the published native checkpoints do.
        begins: start with the BOS token, as the tokenizer does.
    """
    system, ends = (
        json.dumps(text, ensure_ascii=False) for text in (f"<|im_start|>system\n{system_message}{end}", end)
    )
    default = f"{{% if not messages or messages[0]['role'] != 'system' %}}{{{{ {system} }}}}{{% endif %}}"
    return (
        f"{'{{ bos_token }}' if begins else ''}{default if system_message else ''}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
        "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}"
        f"{{{{ {ends} }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
