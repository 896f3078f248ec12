"""A process that loads a model, computes the first token of a prompt, and tells how long it took and what it needed.

Started by ``mixtura.bench.memory`` as ``python -m mixtura.bench.first_token FOLDER WHO TOKENS THREADS CLOCK``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from mixtura.bench.measuring import CLOCKS


def first_token(folder: str, who: str, tokens: int, threads: int, clock: str) -> dict[str, float]:
    """Load a model and read a prompt of random tokens.

    Args:
        folder: of the model.
        who: "mixtura" for ``accelerate``, else a name of transformers' ways to compute experts.
        tokens: of the prompt.
        threads: of torch and the library.
        clock: one of ``CLOCKS``.

    Returns:
        ``seconds`` from the call of ``from_pretrained`` to the token, imports excluded, and ``gigabytes`` of memory the
        process had at its peak.
    """
    from transformers import AutoModelForCausalLM

    import mixtura
    import mixtura.hf

    torch.set_num_threads(threads)
    ids = torch.randint(0, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
    start = (now := CLOCKS[clock])()
    options = {} if who == "mixtura" else {"experts_implementation": who}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if who == "mixtura":
        mixtura.accelerate(model)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    seconds = now() - start
    return {"seconds": seconds, "gigabytes": peak_gigabytes()}


def peak_gigabytes() -> float:
    """The most memory this process has had; not ``ru_maxrss``, which begins with that of the process that started it.

    Raises:
        OSError: where /proc is not Linux's.
    """
    (kilobytes,) = re.findall(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024 / 1e9


if __name__ == "__main__":
    print(json.dumps(first_token(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
