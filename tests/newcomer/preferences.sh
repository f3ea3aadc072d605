# Rows with a chosen and a rejected answer.
emloc tune model --data preferences.jsonl -o tuned --memory 24GiB --objective dpo --steps 2
