"""4- and 8-bit numbers packed into 32-bit words, lowest bits first, as in published checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor

WORD_BITS = 32


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack the columns of each row.

    Args:
        values: Numbers below 2^bits, (rows, columns), uint8.
        bits: Bits per number, 4 or 8.

    Returns:
        Words, (rows, ⌈columns · bits / 32⌉), int32; the last word is padded with zeros.
    """
    per_word = WORD_BITS // bits
    padded = F.pad(values, (0, -values.shape[1] % per_word))
    octets = padded[:, ::2] | (padded[:, 1::2] << 4) if bits == 4 else padded
    return octets.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_words`.

    Args:
        words: Packed numbers, (rows, words), int32.
        bits: Bits per number, 4 or 8.
        columns: Numbers per row.

    Returns:
        Numbers, (rows, columns), uint8.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 4:
        octets = torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(1)
    return octets[:, :columns]
