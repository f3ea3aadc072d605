# A base in four bits, as bitsandbytes packs it: a LoRA on it as it is, merged into the original.
emloc plan packed --data train.jsonl --memory 24GiB
emloc tune packed --data train.jsonl -o tuned --memory 24GiB --steps 2
emloc correct tuned/adapter -o corrected
emloc polish corrected --data train.jsonl --steps 1 -o polished
emloc eval --new-task completion_nll --data tuned/held_out.jsonl -o my_task.yaml
emloc eval my_task.yaml --base packed --adapter tuned/adapter --polished polished -o evaluation
emloc merge polished --base model -o merged
