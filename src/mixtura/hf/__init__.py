"""transformers: the family ``mixtura``, backends, structure, loading, export. Importing this registers all of them."""

from mixtura.hf.forward import record
from mixtura.hf.modeling import MixturaConfig, convert, family, mixtures, routers
from mixtura.hf.quantizer import MixturaQuantizationConfig, quantize_model
from mixtura.hf.sites import FeedForwardWeights, Site, feed_forward_sites

__all__ = [
    "FeedForwardWeights",
    "MixturaConfig",
    "MixturaQuantizationConfig",
    "Site",
    "convert",
    "family",
    "feed_forward_sites",
    "mixtures",
    "quantize_model",
    "record",
    "routers",
]
