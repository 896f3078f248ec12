"""A byte-level tokenizer built in code: every byte is a token, and a few pairs are merged."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MERGES = [("t", "h"), ("Ġ", "th"), ("e", "r"), ("Ã", "¼")]  # the last one is the two bytes of ü
VOCABULARY_SIZE = 256 + len(MERGES) + 1


def byte_tokenizer():
    """Tokenizer with 261 entries; the last is the end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    vocabulary = {piece: i for i, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
