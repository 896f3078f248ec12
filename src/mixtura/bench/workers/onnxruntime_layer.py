"""onnxruntime's MoE operator, float32, and its QMoE with 8 and 4 bits in groups of 32; tokens are float32.

Both take logits and select by themselves; their gate and up rows are interleaved.
"""

import os

import numpy as np
import onnxruntime
from layer_arrays import read
from loop import serve
from onnx import TensorProto, helper

_TYPES = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("uint8"): TensorProto.UINT8}


class Layer:
    """The experts of one layer in a session, and the tokens of one case."""

    def load(self, folder, threads, slots, bits):
        """Take the weights from the folder."""
        self.folder, self.calls, self.session = folder, {}, None
        names = ("first-codes", "first-scales", "down-codes", "down-scales") if bits else ("first", "down")
        weights = {name: prepared(read(folder, name), name, bits) for name in names}
        if not bits and weights["first"].dtype != np.float32:
            raise TypeError("float32 only")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        for name, array in weights.items():
            array.tofile(os.path.join(folder, f"{name}.bin"))
        path = os.path.join(folder, "layer.onnx")
        with open(path, "wb") as file:
            file.write(graph(weights, slots, bits).SerializeToString())
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return {"versions": {"onnxruntime": onnxruntime.__version__}}

    def case(self, name):
        """Take the tokens of a case."""
        feed = {"hidden": read(self.folder, f"{name}-hidden"), "logits": read(self.folder, f"{name}-logits")}
        if feed["hidden"].dtype == np.uint16:  # bfloat16
            feed["hidden"] = (feed["hidden"].astype(np.uint32) << 16).view(np.float32)
        self.calls = {"onnxruntime": lambda: self.session.run(None, feed)}
        return {"who": list(self.calls)}

    def output(self, who, path):
        """Write what one computes."""
        np.save(path, self.calls[who]()[0])


def prepared(array, name, bits):
    """With gate and up rows in turns, and two codes of 4 bits in a byte."""
    if name.startswith("first"):
        width = array.shape[1] // 2
        array = np.stack([array[:, :width], array[:, width:]], 2).reshape(array.shape)
    if bits == 4 and name.endswith("codes"):
        array = array[..., ::2] | array[..., 1::2] << 4
    return array


def graph(weights, slots, bits):
    """One node; its weights lie in files beside it."""
    tensors = []
    for name, array in weights.items():
        one = TensorProto(name=name, data_type=_TYPES[array.dtype], dims=array.shape)
        one.data_location = TensorProto.EXTERNAL
        one.external_data.add(key="location", value=f"{name}.bin")
        tensors.append(one)
    node = helper.make_node(
        "QMoE" if bits else "MoE",
        ["hidden", "logits", *inputs_of(bits)],
        ["out"],
        domain="com.microsoft",
        k=slots,
        activation_type="swiglu",
        swiglu_fusion=1,
        normalize_routing_weights=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        **({"expert_weight_bits": bits, "block_size": 32, "accuracy_level": 4} if bits else {}),
    )
    experts, width = weights[inputs_of(bits)[-1]].shape[:2]
    inputs = [("hidden", width), ("logits", experts)]
    places = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["T", w]) for n, w in inputs]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", width])
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(helper.make_graph([node], "layer", places, [out], tensors), opset_imports=versions)
    made.ir_version = 9
    return made


def inputs_of(bits):
    """Names of the weights in the operator's order."""
    return ["first-codes", "first-scales", "", "down-codes", "down-scales"] if bits else ["first", "", "down"]


serve(Layer())
