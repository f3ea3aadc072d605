"""The page that shows a zoo."""
