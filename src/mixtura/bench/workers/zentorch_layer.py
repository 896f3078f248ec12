"""zentorch's fused experts: float32, bfloat16, and 8 bits with a scale for each row."""

import numpy as np
import torch
import zentorch
from layer_arrays import tensor
from loop import serve


class Layer:
    """The experts of one layer, and the tokens of one case."""

    def load(self, folder, threads, bits):
        """Take the weights from the folder."""
        if bits not in (None, 8):
            raise TypeError("8 bits only")
        torch.set_num_threads(threads)
        self.folder, self.calls = folder, {}
        self.weights, self.scales = [tensor(folder, "first"), tensor(folder, "down")], []
        if bits:
            self.weights, self.scales = map(list, zip(*map(rounded, self.weights), strict=True))
        return {"versions": {"zentorch": zentorch.__version__}}

    def case(self, name):
        """Take the tokens of a case."""
        hidden, chosen, weights = (tensor(self.folder, f"{name}-{part}") for part in ("hidden", "indices", "weights"))
        chosen, self.out = chosen.int(), torch.empty_like(hidden)
        fused = torch.ops.zentorch.zentorch_fused_moe
        given = (self.out, hidden, *self.weights, None, None, weights, chosen, False, "silu", *self.scales)
        self.calls = {"zentorch": lambda: fused(*given)}
        return {"who": list(self.calls)}

    def output(self, who, path):
        """Write what one computes."""
        self.calls[who]()
        np.save(path, self.out.float().numpy())


def rounded(weight_ENK):
    """Codes, and scales (E, N)."""
    scale_EN = weight_ENK.abs().amax(-1).float() / 127
    parts = zip(weight_ENK, scale_EN, strict=True)  # an expert at a time: no copy of all in float32
    codes = [(weight_NK.float() / scale_N[:, None]).round().to(torch.int8) for weight_NK, scale_N in parts]
    return torch.stack(codes), scale_EN


serve(Layer())
