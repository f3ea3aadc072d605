"""Train a LoRA on an emulator with a script of your own.

    python train_with_your_own_script.py EMULATOR rows.jsonl ADAPTER --trainer sft
    emloc correct ADAPTER --base BASE -o CORRECTED

The rows have ``prompt`` and ``completion``. Leave out those in the emulator's calibration.jsonl and selection.jsonl:
the correction is chosen on rows that were not trained on.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import emloc_core.standins.quantizer  # noqa: F401 - loads emulators, even where the entry point torch.backends is off

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the prompts and completions of a JSONL file."""
    with path.open("rb") as file:  # in bytes: str.splitlines would also break a line at U+2028 within a string
        rows = [json.loads(line) for line in file if line.strip()]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def tune_with_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], settings: dict
) -> PeftModel:
    """Train with TRL, which tokenizes, and puts the loss on the completions."""
    trainer = SFTTrainer(
        model,
        args=SFTConfig(max_length=None, **settings),  # TRL would cut at 1024 tokens
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def tune_with_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], settings: dict
) -> PeftModel:
    """Train with the plain Trainer of transformers."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    peft_model = get_peft_model(model, LORA)
    trainer = Trainer(
        peft_model,
        args=TrainingArguments(**settings),
        train_dataset=Dataset.from_list([encode(row) for row in rows]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    return peft_model


def shares_of_words(completions: list[str], expected: list[str], **_: object) -> list[float]:
    """Reward each answer by how many of the words that were expected it has."""
    wanted = [set(text.split()) for text in expected]
    return [len(words & set(text.split())) / len(words) for text, words in zip(completions, wanted, strict=True)]


def tune_with_grpo(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], settings: dict
) -> PeftModel:
    """Train with TRL's GRPO, which lets the emulator answer, and rewards the better of its answers."""
    trainer = GRPOTrainer(
        model,
        reward_funcs=shares_of_words,
        args=GRPOConfig(num_generations=4, max_completion_length=16, **settings),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "expected": row["completion"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    return trainer.model


def main() -> None:
    """Train, and save the adapter."""
    parser = argparse.ArgumentParser()
    parser.add_argument("emulator", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--trainer", choices=["sft", "plain", "grpo"], default="sft")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    emulator = str(options.emulator.absolute())  # the adapter's config names it so, for any working directory
    tokenizer = AutoTokenizer.from_pretrained(emulator)
    model = AutoModelForCausalLM.from_pretrained(emulator, dtype="auto")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    held_out = [
        row
        for name in ("calibration.jsonl", "selection.jsonl")
        for row in read_rows(options.emulator / name)  # empty where none were held out
    ]
    rows = [row for row in read_rows(options.rows) if row not in held_out]

    tune = {"sft": tune_with_sft, "plain": tune_with_trainer, "grpo": tune_with_grpo}[options.trainer]
    settings = {
        "output_dir": str(options.adapter.with_name(f"{options.adapter.name}-checkpoints")),
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": 8,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
    }
    tune(model, tokenizer, rows, settings).save_pretrained(str(options.adapter))


if __name__ == "__main__":
    main()
