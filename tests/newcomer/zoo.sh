# Three models at once.
emloc zoo convert models --data train.jsonl -o zoo --dry-run
emloc zoo convert models --data train.jsonl -o zoo
emloc zoo status zoo
