"""Write bundles as models of NVIDIA's Triton Inference Server.

`repository.py` writes a model's folder; `model.py` is the code that Triton runs in it.
"""
