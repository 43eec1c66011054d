"""Chooses the next token of every sequence, on the device and without waiting for it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.foundation.errors import UserError

try:
    from teal.kernels.cuda import embed_argmax
    from teal.kernels.cuda.nvrtc import can_compile
except ImportError:
    embed_argmax = None  # type: ignore[assignment]

# Recorded instead of a token if its logits hold NaN or infinity.
NONFINITE = -1

# Below this a temperature counts as 0.
_MIN_TEMPERATURE = 1e-5
# Probabilities are multiplied by this and summed as integers: a sum of floats over a vocabulary
# differs from run to run on a GPU.
_PROBABILITY_SCALE = float(1 << 40)
_SEEDS = 1 << 63


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen from the logits.

    Applied in the order of Hugging Face transformers: repetition penalty, temperature, top-k,
    top-p, min-p.

    Attributes:
        temperature: Divisor of the logits; 0 takes the likeliest token and ignores the rest.
        top_k: Sample from the `top_k` likeliest tokens only; 0 is all.
        top_p: Sample from the likeliest tokens whose probabilities reach this sum.
        min_p: Sample from tokens at least this many times as likely as the likeliest.
        repetition_penalty: Divides positive and multiplies negative logits of the tokens in prompt
            and continuation; 1 is none.
        seed: Sequence i of a call draws its random numbers from `seed + i`.

    Raises:
        UserError: A value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.temperature < math.inf, "temperature", self.temperature, "a number ≥ 0"
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "a number of tokens, or 0 for all")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "a number in [0, 1]")
        _require(
            0.0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "a number > 0, such as 1.1",
        )
        _require(0 <= self.seed < _SEEDS, "seed", self.seed, f"an integer in [0, {_SEEDS})")


@dataclass(frozen=True, kw_only=True)
class SamplingForm:
    """Which operations a choice takes; a captured graph serves all settings of one form."""

    is_greedy: bool
    top_k: int
    has_top_p: bool
    has_min_p: bool
    has_penalty: bool
    has_logprobs: bool

    @classmethod
    def of(cls, settings: SamplingSettings, *, logprobs: bool) -> "SamplingForm":
        """Return the form of `settings`."""
        is_greedy = settings.temperature < _MIN_TEMPERATURE
        return cls(
            is_greedy=is_greedy,
            top_k=0 if is_greedy else settings.top_k,
            has_top_p=not is_greedy and settings.top_p < 1.0,
            has_min_p=not is_greedy and settings.min_p > 0.0,
            has_penalty=settings.repetition_penalty != 1.0,
            has_logprobs=logprobs,
        )


class Sampler:
    """Chooses tokens for a fixed number of sequences.

    A call takes logits and advances by one step. It never waits for the device and allocates
    nothing that depends on values, so it can be captured in a CUDA graph. Equal logits and seeds
    give equal tokens on every device.

    Args:
        form: Which operations a choice takes.
        batch_size: Number of sequences.
        vocab_size: Tokens to choose from.
        steps: Largest number of choices after one `begin`.
        device: Device of the logits.

    Attributes:
        form: Operations of a choice.
        tokens: The latest tokens, (batch_size,), int64; an arbitrary token id if the logits hold
            NaN or infinity.
        history: Tokens of every step since `begin`, (steps, batch_size), int64, with `NONFINITE`
            if the logits hold NaN or infinity. In pinned host memory if a single kernel makes the
            choice, to be read after an event behind the step; else on the device.
        logprobs: Log-probabilities of `history` under the unchanged logits, (steps, batch_size),
            float32; written only if the form has them.
    """

    def __init__(
        self,
        form: SamplingForm,
        batch_size: int,
        vocab_size: int,
        steps: int,
        device: torch.device,
    ) -> None:
        self.form = form
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # If only the largest logit counts, one kernel does everything.
        is_plain = form.is_greedy and not form.has_penalty and not form.has_logprobs
        self._is_one_launch = is_plain and batch_size == 1 and _can_launch(device)
        self.history = (
            torch.zeros(steps, batch_size, dtype=torch.int64, pin_memory=True)
            if self._is_one_launch
            else torch.zeros(steps, batch_size, dtype=torch.int64, device=device)
        )
        self.logprobs = torch.zeros(steps, batch_size, dtype=torch.float32, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(steps, batch_size, dtype=torch.float64, device=device)
        self._seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device)
        self._values = {
            name: torch.ones((), dtype=torch.float32, device=device)
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        }

    def begin(self, settings: SamplingSettings, prompts: Sequence[Tensor]) -> None:
        """Start a new batch.

        Args:
            settings: Values for this sampler's form.
            prompts: Token ids of every sequence, (tokens,), int64, on the device.
        """
        self._step.zero_()
        for name, value in self._values.items():
            value.fill_(getattr(settings, name))
        if self.form.has_penalty:
            self._seen.zero_()
            for index, prompt in enumerate(prompts):
                self._seen[index, prompt] = True
        if not self.form.is_greedy:
            self._uniforms.copy_(_uniforms(settings.seed, self._uniforms.shape))

    def __call__(self, logits: Tensor) -> None:
        """Choose a token for every sequence: set `tokens`, a row of `history` and of `logprobs`.

        Args:
            logits: Logits, (batch_size, vocab_size), bfloat16, float16 or float32; compared in
                float32.
        """
        if self._is_one_launch:
            embed_argmax.argmax(logits, self.tokens, self.history, self._step, NONFINITE)
            return
        logits = logits.float()
        best, tokens = logits.max(-1)
        if self.form.has_penalty or not self.form.is_greedy:
            scores = self._penalised(logits)
            tokens = scores.argmax(-1) if self.form.is_greedy else self._draw(scores)
        if self.form.has_logprobs:
            chosen = logits.log_softmax(-1).gather(-1, tokens[:, None])
            self.logprobs.index_copy_(0, self._step, chosen.view(1, -1))
        if self.form.has_penalty:
            self._seen.scatter_(1, tokens[:, None], True)
        self.tokens.copy_(tokens)
        checked = tokens.masked_fill(~best.isfinite(), NONFINITE)
        self.history.index_copy_(0, self._step, checked[None])
        self._step.add_(1)

    def _penalised(self, logits: Tensor) -> Tensor:
        if not self.form.has_penalty:
            return logits
        penalty = self._values["repetition_penalty"]
        repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(self._seen, repeated, logits)

    def _draw(self, scores: Tensor) -> Tensor:
        """Draw a token per sequence by inverting the cumulative distribution at a stored number."""
        scaled = (scores - scores.amax(-1, keepdim=True)) / self._values["temperature"]
        candidates = None
        if self.form.top_k:
            scaled, candidates = scaled.topk(min(self.form.top_k, scaled.shape[-1]))
        elif self.form.has_top_p:
            scaled, candidates = scaled.sort(descending=True, stable=True)
        cumulative = self._weights(scaled.softmax(-1)).cumsum(-1)
        uniform = self._uniforms.index_select(0, self._step).view(-1, 1)
        target = (uniform * cumulative[:, -1:]).long()
        drawn = torch.searchsorted(cumulative, target, right=True)
        # Only NaN can lead beyond the end, and such a token is not used.
        drawn = drawn.clamp(max=scaled.shape[-1] - 1)
        return (drawn if candidates is None else candidates.gather(-1, drawn)).view(-1)

    def _weights(self, probabilities: Tensor) -> Tensor:
        """Return the probabilities as integers, 0 for tokens that may not be drawn."""
        weights = (probabilities * _PROBABILITY_SCALE).long()
        if self.form.has_top_p:
            before = weights.cumsum(-1) - weights
            weights = weights * (before < self._values["top_p"].double() * _PROBABILITY_SCALE)
        if self.form.has_min_p:
            least = self._values["min_p"] * probabilities.amax(-1, keepdim=True)
            weights = weights * (probabilities >= least)
        return weights


def _can_launch(device: torch.device) -> bool:
    if device.type != "cuda" or embed_argmax is None:
        return False
    return can_compile(torch.cuda.get_device_capability(device))


def _require(is_fine: bool, name: str, value: object, allowed: str) -> None:
    if not is_fine:
        raise UserError(f"{name} {value!r} is out of range. Give {allowed}.")


def _uniforms(seed: int, shape: Sequence[int]) -> Tensor:
    """Return numbers in [0, 1), (steps, batch_size), float64, from one generator per sequence.

    They are drawn on the CPU, so that a seed means the same on every device.
    """
    steps, batch_size = shape
    generators = (torch.Generator().manual_seed(seed + index) for index in range(batch_size))
    columns = [
        torch.rand(steps, dtype=torch.float64, generator=generator) for generator in generators
    ]
    return torch.stack(columns, dim=1)
