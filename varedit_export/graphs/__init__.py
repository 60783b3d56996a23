"""Each stage of an edit as an ONNX graph."""
