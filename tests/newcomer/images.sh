# Rows with pictures.
emloc plan model --data pictures/rows.jsonl --memory 24GiB
emloc tune model --data pictures/rows.jsonl -o tuned --memory 24GiB --steps 1
