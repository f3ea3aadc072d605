# A base in four bits, as bitsandbytes packs it: a LoRA on it as it is, merged into the original.
emloc plan packed --data train.jsonl --memory 24GiB
emloc tune packed --data train.jsonl -o tuned --memory 24GiB --steps 2
emloc merge tuned/adapter --base model -o merged
