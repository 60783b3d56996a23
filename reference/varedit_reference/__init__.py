"""The PyTorch reference of VAREdit (arXiv 2508.15772): what every export is proven against.

Where to look:

- `config.py`: sizes as data, the presets.
- `pipeline.py`: one edit from pictures and instructions to pictures.
- `scale_loop.py`: the autoregressive loop over scales; `sampling.py`: from logits to bits.
- `transformer.py`: the transformer, read top to bottom; `rotary.py`: its positions.
- `kv_cache.py`: the explicit KV cache, and what teacher forcing sees in its place.
- `sar.py`: the scale-aligned reference (SAR) of block 0.
- `tokenizer.py`, `quantisation.py`: pictures to bits and back.
- `text_encoder.py`: instructions to features.
- `checkpoint.py`, `weights_file.py`: the released weights, by name; `convert.py`: one file each.
- `initialise.py`: random weights by seed.
- `golden/`: recordings of the released implementation, and the check against them.
"""
