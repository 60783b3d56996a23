"""Write the graphs of a product: the bench's yardstick, and the probe of 8-bit integers."""

from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from varedit_runtime.backends.onnxruntime import integers
from varedit_runtime.bench import PRODUCT


def product_graph() -> bytes:
    """Return the ONNX graph of c = a @ b, on square fp32 matrices of any size."""
    a, b, c = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", "n"]) for n in "abc")
    return _model(helper.make_node("MatMul", "ab", "c"), [a, b], c)


def integer_product_graph() -> bytes:
    """Return the ONNX graph of c = a @ b, a uint8 and b int8 of any size, c int32."""
    types = {"a": TensorProto.UINT8, "b": TensorProto.INT8, "c": TensorProto.INT32}
    sizes = {"a": ["m", "k"], "b": ["k", "n"], "c": ["m", "n"]}
    a, b, c = (helper.make_tensor_value_info(n, types[n], sizes[n]) for n in "abc")
    return _model(helper.make_node("MatMulInteger", "ab", "c"), [a, b], c)


def _model(node: NodeProto, inputs: list[ValueInfoProto], output: ValueInfoProto) -> bytes:
    graph = helper.make_graph([node], "product", inputs, [output])
    opset = helper.make_opsetid("", 17)  # an old one, which every onnxruntime reads
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    model.ClearField("producer_name")
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    PRODUCT.write_bytes(product_graph())
    integers.PRODUCT.write_bytes(integer_product_graph())
