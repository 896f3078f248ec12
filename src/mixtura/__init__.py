"""mixtura: one workbench for mixtures, y(x) = sum_k g_k(x) f_k(x).

``import mixtura`` is light: neither torch nor transformers is imported until something that needs them is used.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "accelerate":
        from mixtura.hf.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module 'mixtura' has no attribute {name!r}")
