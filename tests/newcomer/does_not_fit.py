"""A model that is tuned in less memory than it needs, stage by stage."""

import emloc_core as emloc

emulator = emloc.compress("model", "train.jsonl", "emulator", memory="24GiB")
adapter = emloc.train(emulator, "train.jsonl", "adapter", steps=2)
corrected = emloc.correct(adapter)
polished = emloc.polish(corrected, "train.jsonl", steps=1)
model = emloc.merge(polished, "merged").load()
assert model.num_parameters() > 0
