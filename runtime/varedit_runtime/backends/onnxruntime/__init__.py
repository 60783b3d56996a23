"""A bundle's graphs on ONNX Runtime: `spec.py` describes the backend, `backend.py` runs it."""
