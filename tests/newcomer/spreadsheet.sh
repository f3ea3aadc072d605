# A spreadsheet that was saved as CSV, with columns of its own.
emloc tune model --data sheet.csv --columns prompt=question,completion=answer -o tuned --memory 24GiB --steps 2 --merge
