"""Text: what can be fetched, domains of it, blocks of tokens in given proportions. Neither torch nor transformers."""

from mixtura.data.blocks import MixedBlocks
from mixtura.data.corpus import Corpus, load_domain
from mixtura.data.domains import DOMAINS
from mixtura.data.fetch import SOURCES, fetch

__all__ = ["DOMAINS", "SOURCES", "Corpus", "MixedBlocks", "fetch", "load_domain"]
