# A model that an ordinary LoRA fits: one command does all of it.
emloc tune model --data train.jsonl -o tuned --memory 24GiB --steps 2
emloc tune model --data train.jsonl -o tuned --memory 24GiB --steps 2
emloc run tuned/recipe.toml --dry-run
