"""zentorch's fused experts."""

import numpy as np
import torch
import zentorch
from layer_arrays import tensor
from loop import serve


class Layer:
    """The experts of one layer, and the tokens of one case."""

    def load(self, folder, threads):
        """Take the weights from the folder."""
        torch.set_num_threads(threads)
        self.folder, self.calls = folder, {}
        self.first, self.down = tensor(folder, "first"), tensor(folder, "down")
        return {"versions": {"zentorch": zentorch.__version__}}

    def case(self, name):
        """Take the tokens of a case."""
        hidden, chosen, weights = (tensor(self.folder, f"{name}-{part}") for part in ("hidden", "indices", "weights"))
        chosen, self.out = chosen.int(), torch.empty_like(hidden)
        fused = torch.ops.zentorch.zentorch_fused_moe
        experts = (self.first, self.down, None, None)
        self.calls = {"zentorch": lambda: fused(self.out, hidden, *experts, weights, chosen, False, "silu")}
        return {"who": list(self.calls)}

    def output(self, who, path):
        """Write what one computes."""
        self.calls[who]()
        np.save(path, self.out.float().numpy())


serve(Layer())
