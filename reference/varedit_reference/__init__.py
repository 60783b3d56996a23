"""The PyTorch reference of VAREdit (arXiv 2508.15772): what every export is proven against.

Where to look:

- `config.py`: sizes as data, the presets.
- `pipeline.py`: one edit from pictures and instructions to pictures.
- `scale_loop.py`: the autoregressive loop over scales.
- `transformer.py`: the transformer, read top to bottom.
- `kv_cache.py`: the explicit cache, and the scale-aligned reference (SAR) of block 0.
- `tokenizer.py`, `quantisation.py`: pictures to bits and back.
- `checkpoint.py`: the released weights, by name.
- `golden.py`: the check against recordings of the released implementation.
"""
