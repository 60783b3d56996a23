"""Weights that users name: published ones, on the Hugging Face hub, LoRA adapters."""
