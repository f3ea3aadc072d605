"""Exact LoRA steps on a base that does not fit in memory."""
