"""What attention remembers of the tokens so far."""

import torch

from teal.engine.weights.memory import require_memory
from teal.foundation.errors import UserError
from teal.models.architectures import Architecture


class KeyValueCache:
    """Keys and values of up to `rows` independent streams, of up to `capacity` tokens each.

    How long the streams are is kept in one place, on the device, so that a captured CUDA graph can
    go on counting.

    Attributes:
        capacity: Tokens that fit into each stream.
        keys: Keys per layer, (rows, kv_heads, capacity, head_dim), contiguous.
        values: Values per layer, as `keys`.
        positions: Index of the next token of each stream, (rows,), int64.
        cosines: Rotary embedding per layer, (capacity, rotary_dim / 2), float32; layers that are
            alike share one tensor.
        sines: As `cosines`.
    """

    def __init__(
        self,
        architecture: Architecture,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if rows < 1 or capacity < 1:
            raise UserError(
                f"A cache of {rows} streams of {capacity} tokens holds nothing. Give 1 or more."
            )
        shape = (architecture.num_layers, rows, architecture.kv_heads, capacity)
        num_bytes = 2 * torch.Size((*shape, architecture.head_dim)).numel() * dtype.itemsize
        require_memory(num_bytes, device, f"The keys and values of {rows} × {capacity} tokens")
        self.capacity = capacity
        # Zeros, for a kernel may read behind a position as long as it weighs that with zero.
        both = torch.zeros((2, *shape, architecture.head_dim), dtype=dtype, device=device)
        self.keys = list(both[0].unbind())
        self.values = list(both[1].unbind())
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        distinct = dict.fromkeys(architecture.ropes)
        tables = {rope: rope.tables(capacity, device) for rope in distinct}
        self.cosines = [tables[rope][0] for rope in architecture.ropes]
        self.sines = [tables[rope][1] for rope in architecture.ropes]

    @property
    def rows(self) -> int:
        """Number of streams."""
        return len(self.positions)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each stream; waits for the device."""
        lengths: list[int] = self.positions.tolist()
        return lengths

    def reset(self) -> None:
        """Forget all tokens, in place."""
        self.positions.zero_()

    def rewind(self, num_tokens: int) -> None:
        """Forget the newest tokens of every stream, in place.

        Args:
            num_tokens: How many, at most as many as the shortest stream has.
        """
        self.positions -= num_tokens

    def require_room(self, num_tokens: int, row: int) -> int:
        """Return the length of a stream if more tokens fit into it.

        Args:
            num_tokens: How many shall be added.
            row: The stream.

        Raises:
            UserError: They do not fit; the message says how many tokens need room and have it.
        """
        length = self.lengths[row]
        if length + num_tokens > self.capacity:
            raise UserError(
                f"{length + num_tokens} tokens need room and the cache has {self.capacity}. "
                "Shorten the prompt or make an engine of more capacity."
            )
        return length
