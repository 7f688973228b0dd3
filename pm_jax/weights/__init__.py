"""Weights of public models as files: their layouts, reading, writing, and LoRA adapters."""
