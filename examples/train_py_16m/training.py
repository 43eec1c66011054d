"""Training for a fixed time, and the folder that Hugging Face libraries open."""

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from model import CONFIG, build
from safetensors.torch import save_file
from tokens import TEXTS, TOKENIZER, load_tokens
from torch import Tensor

_WEIGHTS = "model.safetensors"
_CONTEXT = CONFIG.max_position_embeddings

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Attributes:
        minutes: Length of the run by the clock; the learning rate falls to zero over it.
        learning_rate: Its peak.
        weight_decay: On matrices.
        dropout: On the embedding and on every branch.
        batch_size: Sequences a step.
        warmup: Steps until the peak learning rate.
        val_every: Seconds between two validations.
        val_windows: Sequences of the held-out text to validate on.
        compile: Use `torch.compile`.
    """

    minutes: float = 3.5
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.0
    batch_size: int = 128
    warmup: int = 300
    val_every: float = 15.0
    val_windows: int = 384
    compile: bool = True


def train(data: Path, out: Path, settings: Settings) -> None:
    """Train on the token files in `data`; write weights, rounded to bfloat16, and log to `out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("w") as log:

        def say(message: str) -> None:
            print(message, flush=True)
            print(message, file=log, flush=True)

        trainer = Trainer(data, settings, device, say)
        trainer.warm_up()
        trainer.run()
        save_file(trainer.rounded_weights(), out / _WEIGHTS, metadata={"format": "pt"})


def join(data: Path, run: Path, out: Path) -> None:
    """Put weights, configuration, tokenizer and texts into one Hugging Face folder."""
    out.mkdir(parents=True, exist_ok=True)
    CONFIG.save_pretrained(out)
    tokenizer_files = (data / TOKENIZER).iterdir()
    for file in (run / _WEIGHTS, *tokenizer_files, *(data / name for name in TEXTS)):
        shutil.copyfile(file, out / file.name)
    # The class name that every transformers release knows.
    config = out / "tokenizer_config.json"
    known = r'"tokenizer_class": "PreTrainedTokenizerFast"'
    config.write_text(re.sub(r'"tokenizer_class": "\w+"', known, config.read_text()))


class Trainer:
    """A model, its optimizer and its data on one device."""

    def __init__(self, data: Path, settings: Settings, device: str, say: Say) -> None:
        self._settings, self._device, self._say = settings, device, say
        self._training = load_tokens(data / "train.u16.xz", device)
        self._held_out = load_tokens(data / "heldout.u16.xz", device)
        say(f"train tokens {len(self._training)} held-out tokens {len(self._held_out)}")
        self._model = build(settings.dropout).to(device)
        say(f"parameters {sum(p.numel() for p in self._model.parameters())}")
        self._loss = torch.compile(self._model) if settings.compile else self._model
        self._optimizer = self._new_optimizer()
        self._batches = self._endless_batches()
        self._losses: list[Tensor] = []
        self._steps = 0

    def warm_up(self) -> None:
        """Compile outside the clock, without an optimizer step."""
        for _ in range(3):
            self._backward()
        self._optimizer.zero_grad(set_to_none=True)
        self._say(f"val at start {self.validate():.4f}")

    def run(self) -> None:
        """Train until the time is up, validating now and then."""
        start, spent, budget = time.time(), 0.0, self._settings.minutes * 60
        next_validation = self._settings.val_every
        while spent < budget:
            rate = self._learning_rate(spent / budget)
            norm = self._step(rate)
            if self._steps % 10 == 0 and self._device == "cuda":
                torch.cuda.synchronize()
            spent = time.time() - start
            if spent >= min(next_validation, budget):
                next_validation += self._settings.val_every
                self._report(spent, rate, norm)

    @torch.no_grad()
    def validate(self) -> float:
        """Return the mean loss on windows spread over the held-out text, nats per token."""
        last, size = len(self._held_out) - _CONTEXT - 2, self._settings.batch_size
        starts = torch.linspace(0, last, self._settings.val_windows, device=self._device).long()
        self._model.eval()
        losses = [
            self._forward(self._held_out, part).item()
            for part in starts.split(size)
            # On a GPU a batch of another size would be compiled anew.
            if len(part) == size or self._device == "cpu"
        ]
        self._model.train()
        return sum(losses) / len(losses)

    @torch.no_grad()
    def rounded_weights(self) -> dict[str, Tensor]:
        """Round the model to bfloat16 in place and return its state dict, on the CPU."""
        for parameter in self._model.parameters():
            parameter.copy_(parameter.bfloat16())
        self._say(f"final, weights rounded to bf16: val {self.validate():.4f}")
        if self._device == "cuda":
            self._say(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        weights = self._model.state_dict()
        return {name: weight.bfloat16().contiguous().cpu() for name, weight in weights.items()}

    def _new_optimizer(self) -> torch.optim.AdamW:
        parameters = list(self._model.parameters())
        groups = [
            {
                "params": [p for p in parameters if p.dim() == 2],
                "weight_decay": self._settings.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=self._settings.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=self._device == "cuda",
        )

    def _learning_rate(self, progress: float) -> float:
        warm = min((self._steps + 1) / self._settings.warmup, 1.0)
        return self._settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))

    def _step(self, rate: float) -> Tensor:
        """Take one optimizer step and return the norm of the gradient before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._losses.append(self._backward())
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return norm

    def _backward(self) -> Tensor:
        loss = self._forward(self._training, next(self._batches))
        loss.backward()
        return loss.detach()

    def _forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        span = torch.arange(_CONTEXT + 1, device=self._device)
        windows = tokens[starts[:, None] + span].long()
        with torch.autocast(self._device, torch.bfloat16, enabled=self._device == "cuda"):
            return self._loss(windows[:, :-1], windows[:, 1:])

    def _endless_batches(self) -> Iterator[Tensor]:
        """Yield starts of windows; an epoch is disjoint windows at a random offset, shuffled."""
        size = self._settings.batch_size
        while True:
            offset = int(torch.randint(_CONTEXT, (1,)))
            count = (len(self._training) - 1 - offset) // _CONTEXT
            starts = torch.randperm(count, device=self._device) * _CONTEXT + offset
            for begin in range(0, count - size + 1, size):
                yield starts[begin : begin + size]

    def _report(self, spent: float, rate: float, norm: Tensor) -> None:
        loss, self._losses = torch.stack(self._losses).mean().item(), []
        seen = self._steps * self._settings.batch_size * _CONTEXT
        self._say(
            f"step {self._steps}  {spent:.0f} s  lr {rate:.2e}  train {loss:.4f}  "
            f"val {self.validate():.4f}  gnorm {norm:.2f}  "
            f"epoch {seen / len(self._training):.2f}  {seen / spent / 1e6:.3f} Mtok/s"
        )
