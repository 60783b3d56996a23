"""Train a model: the loop that nano was made with, and fine-tuning of all sizes on pairs."""
