# A model that no plugin declares: the same commands.
emloc plan model --data train.jsonl --memory 24GiB
emloc tune model --data train.jsonl -o tuned --memory 24GiB --steps 2
emloc compress model --data train.jsonl -o emulator
emloc train emulator --data train.jsonl -o adapter --steps 2
emloc correct adapter -o corrected
emloc merge corrected -o merged
