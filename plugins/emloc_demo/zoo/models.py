"""The demo's zoo: a small model of every sort, SmolLM2, a damaged copy, and a duplicate.

The small ones have random weights from a seed: the demo is about converting. They share a tokenizer that is learned
from the demo's messages.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2, BROKEN, AGAIN, PICTURES = "smollm2-135m-instruct", "llama-broken", "mistral-again", "internvl-pictures"
EXPERTS = "qwen3-moe"
#: The kinds that the mixture of experts becomes besides ``nf4``.
OTHER_KINDS = ("trellis", "low-rank-nf4", "low-rank-2-bit", "low-rank")
JOBS = "zoo.toml"
_VOCABULARY = 768
#: Tokens by their meaning in a config; these rows never contain the tokens of images.
_MARKS = {
    "pad_token_id": "<|pad|>",
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
_VISION = {"depth": 3, "hidden_size": 64, "intermediate_size": 160, "num_heads": 4, "patch_size": 14,
           "out_hidden_size": 128}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
#: Keyword arguments of ``AutoConfig.for_model``, by name.
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_TEXT},
    "mistral": {"model_type": "mistral", **_TEXT},
    "qwen2": {"model_type": "qwen2", **_TEXT, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_TEXT},
    "qwen3-moe": {"model_type": "qwen3_moe", **_TEXT, **_EXPERTS},
    "qwen2.5-vl": {
        "model_type": "qwen2_5_vl",
        "vision_config": {**_VISION, "window_size": 56, "fullatt_block_indexes": [2]},
        "text_config": {**_TEXT, **_ROTARY},
    },
    "qwen3-vl": {
        "model_type": "qwen3_vl",
        "vision_config": {**_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]},
        "text_config": {**_TEXT, **_ROTARY},
    },
}


def prepare(directory: Path, *, smollm2: bool = True) -> Path:
    """Write models, rows and the file of jobs to ``directory``, each unless it is there; return that file.

    Args:
        directory: directory of everything; it is created.
        smollm2: also write SmolLM2-135M.

    Raises:
        EmlocError: a package of the demo is missing.
    """
    from emloc_demo.data import write_data
    from emloc_demo.model import write_base
    from emloc_demo.preparation import copy_tasks
    from emloc_demo.vision.pictures import load_digits
    from emloc_demo.vision.rows import split
    from emloc_demo.vision.rows import write_data as write_pictures

    models = directory / "models"
    models.mkdir(parents=True, exist_ok=True)
    if not (directory / "data" / "train.jsonl").exists():
        click.echo("writing the messages", err=True)
        write_data(directory / "data")
    copy_tasks("emloc_demo.full", directory)
    if not (directory / "pictures").exists():
        click.echo("drawing the pictures", err=True)
        write_pictures(directory / "pictures", split(load_digits()))
    makers: dict[str, Callable[[Path], object]] = {name: _maker(name, directory / "data") for name in SMALL}
    makers[PICTURES] = _make_with_pictures
    makers[BROKEN] = lambda target: _damage(models / "llama", target)
    makers[AGAIN] = lambda target: shutil.copytree(models / "mistral", target, dirs_exist_ok=True)
    for name, make in makers.items():
        if not (models / name).exists():
            click.echo(f"making the model {name}", err=True)
            with _complete(models / name) as target:
                make(target)
    if smollm2 and not (models / SMOLLM2).exists():
        click.echo("writing SmolLM2-135M-Instruct (dequantised from Q4_1)", err=True)
        write_base(models / SMOLLM2)
    jobs = directory / JOBS
    if not jobs.exists():
        partial = directory / f".{JOBS}.partial"
        partial.write_text(_jobs([*([SMOLLM2] if smollm2 else []), *makers]), encoding="utf-8")
        os.rename(partial, jobs)
    return jobs


def make_tokenizer(rows: Path) -> "PreTrainedTokenizerFast":
    """Return a tokenizer of bytes and frequent pieces, learned from a file of rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(_MARKS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(rows.read_text(encoding="utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_MARKS["bos_token_id"],
        eos_token=_MARKS["eos_token_id"],
        pad_token=_MARKS["pad_token_id"],
        chat_template=_CHAT_TEMPLATE,
    )


def _maker(name: str, data: Path) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        import torch
        import transformers

        from emloc_core.files.pretrained import new_model
        from emloc_core.plugins.manager import plugin_manager

        tokenizer = make_tokenizer(data / "train.jsonl")
        ids = {mark: tokenizer.convert_tokens_to_ids(token) for mark, token in _MARKS.items()}
        ends = {mark: ids[mark] for mark in ("pad_token_id", "bos_token_id", "eos_token_id")}
        settings = dict(SMALL[name])
        if "text_config" in settings:
            settings |= {mark: ids[mark] for mark in ids.keys() - ends.keys()}
            settings["text_config"] = {**settings["text_config"], **ends, "vocab_size": len(tokenizer)}
        else:
            settings |= {**ends, "vocab_size": len(tokenizer)}
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        family = plugin_manager().family_for(config.to_dict())
        with torch.random.fork_rng():
            torch.manual_seed(list(SMALL).index(name))
            model = new_model(family.auto_class, config, torch.float32)
        _save(directory, model, tokenizer)

    return make


def _make_with_pictures(directory: Path) -> None:
    from emloc_demo.vision.pretraining import make_model
    from emloc_demo.vision.processor import make_processor

    processor = make_processor()
    _save(directory, make_model(processor.tokenizer), processor)


def _save(directory: Path, *objects: Any) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # each would show one for an instant
    for item in objects:
        item.save_pretrained(directory)
    logging.enable_progress_bar()


def _damage(model: Path, target: Path) -> None:
    """Copy a model, and cut its weights off in the middle."""
    shutil.copytree(model, target, dirs_exist_ok=True)
    shard = target / "model.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)


def _jobs(names: list[str]) -> str:
    """Return the file of jobs: the first small model goes the whole way, the others end with the emulator.

    The mixture of experts becomes an emulator of every kind.
    """
    whole_way = [
        "train = { steps = 10, batch_size = 4 }",
        "merge = true",
        'test = ["data/test.jsonl"]',
        'eval = { tasks = ["tasks/fields_nll.yaml"], limit = 20 }',
    ]
    sections = []
    for name in names:
        rows = "pictures/calibration.jsonl" if name == PICTURES else "data/train.jsonl"
        steps = whole_way if name == next(iter(SMALL)) else ["train = false"]
        for kind in ("nf4", *OTHER_KINDS) if name == EXPERTS else ("nf4",):
            lines = [f'model = "models/{name}"', f'data = "{rows}"']
            lines.append(f'compress = {{ kind = "{kind}", samples = 16, selection = 8 }}')
            sections.append("\n".join(["[[job]]", *_name_line(name, kind), *lines, *steps]))
    return "\n\n".join(["# The demo's zoo. Paths are relative to this file.", *sections]) + "\n"


def _name_line(model: str, kind: str) -> list[str]:
    """Return the line that names a job, if it is not the model's name."""
    return [f'name = "{model}-{kind}"'] if kind in OTHER_KINDS else []


@contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """Yield a temporary directory, which becomes ``target`` when the block succeeds."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    os.rename(partial, target)
