"""Jobs: parsing, planning, and results."""
