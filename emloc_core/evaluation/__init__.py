"""Systems compared by lm-eval."""
