"""The models that `teal bench decode` measures: folders and random weights, in several formats."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from teal.benchmark.baselines import LLAMA_CPP
from teal.benchmark.model import BenchmarkModel, Workload
from teal.benchmark.model_configs import config_of
from teal.cli.console import progress_bar
from teal.engine.weights.loader import OpenedModel, open_model
from teal.engine.weights.quantized import quantized_head
from teal.engine.weights.random import random_weights
from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of
from teal.models.loading import load_model
from teal.models.placement import resolve_device, resolve_dtype
from teal.quantization import Scheme

# Into what projections are rounded, and whether the head is too.
Format = tuple[Scheme | None, bool]


class Sources:
    """The models of a call, opened one after the other.

    Args:
        models: Folders, or names on the hub.
        configs: Sizes of models with random weights, as `config_of` reads them.
        formats: How to open each of them.
        device: "auto", "cpu" or "cuda".
        dtype: Of activations, and of weights that are floats.
        most_layers: Of a configuration; `None` for all that it has.

    Raises:
        UserError: There is no model, or no such configuration, dtype or device.
    """

    def __init__(
        self,
        models: Sequence[str],
        configs: Sequence[str],
        formats: Sequence[Format],
        *,
        device: str,
        dtype: str,
        most_layers: int | None = None,
    ) -> None:
        if not models and not configs:
            raise UserError("There is no model to measure. Give a MODEL or a --config.")
        if dtype == "auto":
            raise UserError("Give a --dtype to compare in: bfloat16, float16 or float32.")
        resolve_dtype(dtype)
        self._models = models
        self._configs = {name: config_of(name) for name in configs}
        for config in self._configs.values():
            layers = config.num_hidden_layers
            config.num_hidden_layers = min(layers, most_layers or layers)
        self._formats = formats
        self._device = device
        self._dtype = dtype

    def subjects(self, workload: Workload) -> Iterator[BenchmarkModel]:
        """Open the models in every format."""
        for name in (*self._models, *self._configs):
            for scheme, quantize_head in self._formats:
                yield BenchmarkModel(name, self._opened(name, scheme, quantize_head), workload)

    def baseline_model(self, name: str, baselines: Sequence[str]) -> Any:
        """Return the Hugging Face model that baselines run, or `None` where none needs it."""
        if not set(baselines) - {LLAMA_CPP}:
            return None
        if name not in self._configs:
            return load_model(name, device=self._device, dtype=self._dtype)
        with torch.device(resolve_device(self._device)):
            return AutoModelForCausalLM.from_config(
                self._configs[name], dtype=resolve_dtype(self._dtype)
            ).eval()

    def _opened(self, name: str, scheme: Scheme | None, quantize_head: bool) -> OpenedModel:
        if name not in self._configs:
            return open_model(
                name,
                device=self._device,
                dtype=self._dtype,
                quantize=scheme,
                quantize_head=quantize_head,
            )
        architecture = architecture_of(self._configs[name])
        weights = random_weights(
            architecture,
            getattr(torch, self._dtype),
            resolve_device(self._device),
            scheme=scheme,
            progress=progress_bar,
        )
        return OpenedModel(
            architecture=architecture,
            weight_format=weights.format,
            weights=quantized_head(weights) if quantize_head else weights,
        )
