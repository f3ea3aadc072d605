# Three models at once.
emloc zoo convert models --data train.jsonl -o zoo --dry-run
