"""onnxruntime's MoE operator, float32. It takes logits and selects by itself; its gate and up rows are interleaved."""

import os

import numpy as np
import onnxruntime
from layer_arrays import read
from loop import serve
from onnx import TensorProto, helper


class Layer:
    """The experts of one layer in a session, and the tokens of one case."""

    def load(self, folder, threads, slots):
        """Take the weights from the folder."""
        self.folder, self.calls, self.session = folder, {}, None
        first, down = read(folder, "first"), read(folder, "down")
        if first.dtype != np.float32:
            raise TypeError("float32 only")
        width = first.shape[1] // 2
        first = np.stack([first[:, :width], first[:, width:]], 2).reshape(first.shape)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        for name, array in (("first", first), ("down", down)):
            array.tofile(os.path.join(folder, f"{name}.bin"))
        path = os.path.join(folder, "layer.onnx")
        with open(path, "wb") as file:
            file.write(graph(first.shape, down.shape, slots).SerializeToString())
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return {"versions": {"onnxruntime": onnxruntime.__version__}}

    def case(self, name):
        """Take the tokens of a case."""
        feed = {"hidden": read(self.folder, f"{name}-hidden"), "logits": read(self.folder, f"{name}-logits")}
        self.calls = {"onnxruntime": lambda: self.session.run(None, feed)}
        return {"who": list(self.calls)}

    def output(self, who, path):
        """Write what one computes."""
        np.save(path, self.calls[who]()[0])


def graph(first, down, slots):
    """One MoE node; its weights lie in files beside it."""
    tensors = []
    for name, shape in (("first", first), ("down", down)):
        one = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        one.data_location = TensorProto.EXTERNAL
        one.external_data.add(key="location", value=f"{name}.bin")
        tensors.append(one)
    node = helper.make_node(
        "MoE",
        ["hidden", "logits", "first", "", "down"],
        ["out"],
        domain="com.microsoft",
        k=slots,
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )
    width, experts = first[2], first[0]
    inputs = [("hidden", width), ("logits", experts)]
    places = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", w]) for n, w in inputs]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", width])
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "layer", places, [out], tensors), opset_imports=versions)
    made.ir_version = 9
    return made


serve(Layer())
