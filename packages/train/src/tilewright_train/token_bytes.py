"""How many bytes of text each token stands for: the unit of bits per byte."""

import json
import re

import torch
from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: Tokenizer, rows: int) -> torch.Tensor:
    """[rows] int64: bytes of UTF-8 by token.

    Special tokens, and rows that no token has, stand for none. The tokens of a byte-level
    vocabulary are written with one character a byte, so their sum over a text is its size exactly.
    In others «▁» is a space and «<0x0A>» a byte; what their normalizer adds or drops is not seen.
    """
    described = json.loads(tokenizer.to_str())
    is_byte_level = '"ByteLevel"' in json.dumps(described["decoder"])
    added = tokenizer.get_added_tokens_decoder()
    sizes = torch.zeros(rows, dtype=torch.int64)
    for text, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            size = 0 if added[number].special else len(text.encode())
        elif is_byte_level:
            size = len(text)
        else:
            size = 1 if _BYTE.fullmatch(text) else len(text.replace("▁", " ").encode())
        sizes[number] = size
    return sizes
