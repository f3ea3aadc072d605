"""An emulator that the user's own script trains, with nothing of EMLoC in it."""

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import emloc_core as emloc

emulator = emloc.compress("model", "train.jsonl", "emulator", memory="24GiB")
rows = load_dataset("json", data_files="train.jsonl", split="train")
config = SFTConfig("trained", max_steps=2, report_to="none", use_cpu=True, bf16=False)
trainer = SFTTrainer(str(emulator), config, train_dataset=rows, peft_config=LoraConfig(target_modules="all-linear"))
trainer.train()
trainer.save_model("adapter")
emloc.correct("adapter", "corrected", emulator=emulator)
