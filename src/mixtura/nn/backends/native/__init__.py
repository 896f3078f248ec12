"""Experts in C++: one call for the whole step, on weights as they lie in memory.

The library is built with the package where a C++ compiler is found, and chooses the instructions of the processor when
it is loaded: AVX-512 with products of bfloat16, AVX-512, AVX2, or plain vectors. It knows nothing of torch: pointers go
in. Sums are float32, in the order of the experts, and equal to the bit for any number of threads.
"""

from mixtura.nn.backends.native.experts import native_backend, why_not
from mixtura.nn.backends.native.library import instructions, use_instructions

__all__ = ["instructions", "native_backend", "use_instructions", "why_not"]
