"""Write the graph that `varedit-run bench` takes a machine's matrix product rate with."""

from onnx import TensorProto, helper

from varedit_runtime.bench import PRODUCT


def product_graph() -> bytes:
    """Return the ONNX graph of c = a @ b, on square fp32 matrices of any size."""
    a, b, c = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", "n"]) for n in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", "ab", "c")], "product", [a, b], [c])
    opset = helper.make_opsetid("", 17)  # an old one, which every onnxruntime reads
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    model.ClearField("producer_name")
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    PRODUCT.write_bytes(product_graph())
