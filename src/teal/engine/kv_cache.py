"""Keys and values of the tokens so far."""

import torch

from teal.engine.weights.memory import require_memory
from teal.foundation.errors import UserError
from teal.models.architectures import Architecture


class KeyValueCache:
    """Keys and values of a batch of independent sequences.

    The lengths of the sequences are kept on the device alone, so that a captured CUDA graph can
    advance them.

    Args:
        architecture: Architecture of the model.
        batch_size: Number of sequences.
        capacity: Tokens that each sequence can hold.
        dtype: Dtype of keys and values.
        device: Device of all tensors.

    Attributes:
        capacity: Tokens that each sequence can hold.
        keys: Keys per layer, (batch_size, kv_heads, capacity, head_dim), contiguous.
        values: Values per layer, shaped like `keys`.
        positions: Index of the next token of each sequence, (batch_size,), int64.
        cosines: Rotary embedding per layer, (capacity, rotary_dim / 2), float32; layers with equal
            embeddings share one tensor.
        sines: Shaped like `cosines`.

    Raises:
        UserError: The cache would be empty or does not fit into memory.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if batch_size < 1 or capacity < 1:
            raise UserError(
                f"A cache of {batch_size} sequences of {capacity} tokens holds nothing. "
                "Give 1 or more."
            )
        shape = (architecture.num_layers, batch_size, architecture.kv_heads, capacity)
        num_bytes = 2 * torch.Size((*shape, architecture.head_dim)).numel() * dtype.itemsize
        what = f"The keys and values of {batch_size} × {capacity} tokens"
        require_memory(num_bytes, device, what)
        self.capacity = capacity
        # Zeros, because a kernel may read beyond a position and multiply what it reads with zero.
        both = torch.zeros((2, *shape, architecture.head_dim), dtype=dtype, device=device)
        self.keys = list(both[0].unbind())
        self.values = list(both[1].unbind())
        self.positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        distinct = dict.fromkeys(architecture.ropes)
        tables = {rope: rope.tables(capacity, device) for rope in distinct}
        self.cosines = [tables[rope][0] for rope in architecture.ropes]
        self.sines = [tables[rope][1] for rope in architecture.ropes]

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return len(self.positions)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence; waits for the device."""
        lengths: list[int] = self.positions.tolist()
        return lengths

    def reset(self) -> None:
        """Forget all tokens, in place."""
        self.positions.zero_()

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens of every sequence, in place.

        Args:
            num_tokens: Tokens to forget, at most the length of the shortest sequence.
        """
        self.positions -= num_tokens

    def require_room(self, num_tokens: int, index: int) -> int:
        """Return the length of a sequence if more tokens fit into it.

        Args:
            num_tokens: Tokens to append.
            index: Index of the sequence in the batch.

        Raises:
            UserError: They do not fit; the message gives needed and available room in tokens.
        """
        length = self.lengths[index]
        if length + num_tokens > self.capacity:
            raise UserError(
                f"{length + num_tokens} tokens need room and the cache has {self.capacity}. "
                "Shorten the prompt or make an engine with more capacity."
            )
        return length
