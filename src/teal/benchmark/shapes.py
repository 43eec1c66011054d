"""The products of a decode step, by model name or by size."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from teal.benchmark.model_configs import CONFIGS
from teal.foundation.errors import UserError, unknown_name

# One part, or q, k and v beside each other; gate and up.
_PARTS = re.compile(r"(\d+)x(\d+(?:\+\d+){0,2})")
_GATED = re.compile(r"(\d+)x2x(\d+)")
_EXAMPLES = ("4096x11008", "4096x2x14336", "4096x4096+1024+1024")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One product.

    Attributes:
        form: "plain", "parts" (q, k and v) or "gated" (gate and up).
        in_features: Size of the input.
        output_sizes: Columns of every part.
    """

    form: str
    in_features: int
    output_sizes: tuple[int, ...]

    @property
    def out_features(self) -> int:
        """Columns of the weight."""
        return sum(self.output_sizes)

    @property
    def name(self) -> str:
        """For tables, such as "4096 → 2×14336"."""
        out = f"2×{self.output_sizes[0]}" if self.form == "gated" else str(self.out_features)
        return f"{self.in_features} → {out}"


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a model's decoder layer.

    Attributes:
        hidden: hidden_size.
        intermediate: intermediate_size.
        queries: Columns of q_proj.
        keys: Columns of k_proj, and of v_proj.
    """

    hidden: int
    intermediate: int
    queries: int
    keys: int

    @classmethod
    def of(cls, config: Mapping[str, int]) -> "Geometry":
        """Take the sizes from the fields of a Hugging Face configuration."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim", hidden // heads)
        return cls(
            hidden=hidden,
            intermediate=config["intermediate_size"],
            queries=heads * head_dim,
            keys=config["num_key_value_heads"] * head_dim,
        )

    def shapes(self) -> list[Shape]:
        """Return the layer's products in the order of the forward pass, each once."""
        hidden, intermediate = self.hidden, self.intermediate
        qkv = (self.queries, self.keys, self.keys)
        return [
            Shape(form="parts", in_features=hidden, output_sizes=qkv),
            Shape(form="plain", in_features=self.queries, output_sizes=(hidden,)),
            Shape(form="gated", in_features=hidden, output_sizes=(intermediate, intermediate)),
            Shape(form="plain", in_features=intermediate, output_sizes=(hidden,)),
        ]


MODELS: Mapping[str, Geometry] = {name: Geometry.of(config) for name, config in CONFIGS.items()}


def shapes_of(name: str) -> list[Shape]:
    """Return the products that `name` stands for.

    Args:
        name: A key of `MODELS`, or in_features x out_features: "4096x11008", "4096x2x14336" for
            gate and up, "4096x4096+1024+1024" for parts with a threshold each.

    Raises:
        UserError: It is neither.
    """
    if name in MODELS:
        return MODELS[name].shapes()
    shape = _shape_of(name)
    if shape is None:
        raise unknown_name("model or size", name, [*MODELS, *_EXAMPLES])
    if not shape.in_features or not all(shape.output_sizes):
        raise UserError(f"Size {name!r} has a zero. Give sizes such as 4096x11008.")
    return [shape]


def _shape_of(name: str) -> Shape | None:
    gated, parts = _GATED.fullmatch(name), _PARTS.fullmatch(name)
    if gated:
        in_features, width = map(int, gated.groups())
        return Shape(form="gated", in_features=in_features, output_sizes=(width, width))
    if parts:
        output_sizes = tuple(map(int, parts[2].split("+")))
        form = "plain" if len(output_sizes) == 1 else "parts"
        return Shape(form=form, in_features=int(parts[1]), output_sizes=output_sizes)
    return None
