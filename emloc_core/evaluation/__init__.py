"""Systems compared by lm-eval, and conversations with one."""
