"""transformers whose experts are vLLM's "sgl", packed in place of the raw ones."""

import numpy as np
import torch
import transformers
from loop import serve
from transformers.integrations.moe import ExpertsInterface
from vllm_layer import load_operations

_NONE = (None,) * 10
_OPERATIONS = load_operations()


def sgl_experts(experts, hidden, indices, weights):
    """Experts of transformers by vLLM's operation."""
    if not hasattr(experts, "packed"):
        convert = _OPERATIONS.convert_weight_packed
        experts.packed = [convert(part.data) for part in (experts.gate_up_proj, experts.down_proj)]
        for part in (experts.gate_up_proj, experts.down_proj):
            part.data = torch.empty(0, dtype=part.dtype)
    out = torch.empty_like(hidden)
    chosen = (weights.float().contiguous(), indices.int().contiguous())
    _OPERATIONS.fused_experts_cpu(out, hidden.contiguous(), *experts.packed, *chosen, 0, *_NONE, True)
    return out


ExpertsInterface.register("sgl", sgl_experts)


class Model:
    """The model from its folder."""

    def load(self, path, threads):
        """Read it."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=torch.bfloat16, experts_implementation="sgl").eval()
        return {"versions": {"transformers beside sgl": transformers.__version__}}

    def prefill(self, prompts):
        """A run reads the prompt (1, L)."""
        ids = torch.tensor(prompts)
        self.calls = {"transformers + sgl": lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1)}
        return {"who": list(self.calls)}

    def output(self, who, path):
        """Write the logits of the end of the prompt."""
        np.save(path, self.calls[who]().logits[:, -1].float().numpy())


serve(Model())
