"""Other engines that decode a model of the same shapes, timed in the same run."""

import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from teal.foundation.errors import UserError, unknown_name

LLAMA_CPP = "llama-cpp"
_TRANSFORMERS = "transformers"
_TRANSFORMERS_COMPILED = "transformers-compiled"
_TORCH_COMPILE = "torch-compile"
BASELINES = (_TRANSFORMERS, _TRANSFORMERS_COMPILED, _TORCH_COMPILE, LLAMA_CPP)


class Baseline(Protocol):
    """An engine to time; it decodes dense and greedily."""

    name: str

    def time(self, prompt: Sequence[int], new_tokens: int) -> float:
        """Return the microseconds per token after the first."""
        ...


class Generate:
    """`model.generate` of Hugging Face transformers.

    Args:
        model: A Hugging Face model.
        is_compiled: Use a static cache and a compiled step instead of the defaults.
    """

    def __init__(self, model: Any, *, is_compiled: bool) -> None:
        self.name = _TRANSFORMERS_COMPILED if is_compiled else _TRANSFORMERS
        self._model = model
        self._options: dict[str, Any] = {}
        if is_compiled:
            config = CompileConfig(mode=_compile_mode(model))
            # By default, transformers compiles on accelerators only.
            config._compile_all_devices = True
            self._options = {"cache_implementation": "static", "compile_config": config}

    def time(self, prompt: Sequence[int], new_tokens: int) -> float:
        """Return the microseconds per token after the first."""
        ids = torch.tensor([list(prompt)], device=self._model.device)
        watch = _Stopwatch()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=watch,
            **self._options,
        )
        return watch.microseconds_per_token


class CompiledStep:
    """A loop of our own around a compiled forward pass of transformers, as in gpt-fast.

    Args:
        model: A Hugging Face model.
    """

    name = _TORCH_COMPILE

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._capacity = 0
        self._step = torch.compile(self._next, mode=_compile_mode(model), fullgraph=True)

    @torch.inference_mode()
    def time(self, prompt: Sequence[int], new_tokens: int) -> float:
        """Return the microseconds per token after the first."""
        ids = torch.tensor([list(prompt)], device=self._model.device)
        length = ids.shape[1] + new_tokens
        if self._capacity < length:
            self._cache = StaticCache(config=self._model.config, max_cache_len=length)
            self._capacity = length
        self._cache.reset()
        token = self._next(ids, torch.arange(ids.shape[1], device=ids.device)[None])
        watch = _Stopwatch()
        watch.put(ids)
        watch.put(token.cpu())
        for position in range(ids.shape[1], length - 1):
            token = self._step(token, torch.tensor([[position]], device=ids.device)).clone()
            watch.put(token.cpu())
        return watch.microseconds_per_token

    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits = self._model(
            ids, position_ids=positions, past_key_values=self._cache, logits_to_keep=1
        ).logits
        tokens: Tensor = logits[:, -1:].argmax(-1)
        return tokens


class LlamaCpp:
    """llama.cpp through llama-cpp-python.

    Args:
        file: A GGUF file of the model.

    Raises:
        UserError: The package or the file is missing.
    """

    name = LLAMA_CPP

    def __init__(self, file: Path | None) -> None:
        if file is None or not file.is_file():
            raise UserError(
                "The baseline llama-cpp needs the model as a GGUF file. Give --gguf FILE."
            )
        try:
            llama = import_module("llama_cpp").Llama
        except ImportError:
            raise UserError(
                "The baseline llama-cpp needs a package. Install it with: "
                "pip install llama-cpp-python"
            ) from None
        self._model = llama(
            model_path=str(file),
            n_ctx=0,
            n_gpu_layers=-1 if torch.cuda.is_available() else 0,
            n_threads=torch.get_num_threads(),
            verbose=False,
        )

    def time(self, prompt: Sequence[int], new_tokens: int) -> float:
        """Return the microseconds per token after the first."""
        watch = _Stopwatch()
        self._model.reset()
        self._model.eval(list(prompt))
        watch.put(prompt)
        token = self._model.sample(temp=0.0)
        watch.put(token)
        for _ in range(new_tokens - 1):
            self._model.eval([token])
            token = self._model.sample(temp=0.0)
            watch.put(token)
        return watch.microseconds_per_token


def make_baselines(names: Sequence[str], model: Any, gguf: Path | None) -> list[Baseline]:
    """Make baselines that run one model.

    Args:
        names: Some of `BASELINES`.
        model: A Hugging Face model; `None` if no named baseline needs it.
        gguf: The model as a GGUF file, for llama.cpp.

    Raises:
        UserError: A name is unknown, or a package or file that the baseline needs is missing.
    """
    check_baselines(names)
    return [_make_baseline(name, model, gguf) for name in names]


def check_baselines(names: Sequence[str]) -> None:
    """Check the names of baselines.

    Raises:
        UserError: One is unknown.
    """
    for name in names:
        if name not in BASELINES:
            raise unknown_name("baseline", name, BASELINES)


def _make_baseline(name: str, model: Any, gguf: Path | None) -> Baseline:
    if name == LLAMA_CPP:
        return LlamaCpp(gguf)
    if name == _TORCH_COMPILE:
        return CompiledStep(model)
    return Generate(model, is_compiled=name == _TRANSFORMERS_COMPILED)


class _Stopwatch:
    """Records when tokens arrive; has the interface of a streamer of transformers."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def put(self, value: object) -> None:
        """Accept the prompt, then each token."""
        del value
        self._moments.append(time.perf_counter())

    def end(self) -> None:
        """Accept the end of the text."""

    @property
    def microseconds_per_token(self) -> float:
        _, first, *rest = self._moments
        return (rest[-1] - first) * 1e6 / len(rest)


def _compile_mode(model: Any) -> str:
    return "reduce-overhead" if model.device.type == "cuda" else "default"
