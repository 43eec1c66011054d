"""The models that `teal bench decode` measures: from folders or with random weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from teal.benchmark.baselines import LLAMA_CPP
from teal.benchmark.model import BenchmarkModel, Workload
from teal.benchmark.model_configs import config_of
from teal.cli.bench_options import bench_dtype
from teal.cli.console import progress_bar
from teal.engine.weights.loader import OpenedModel, open_model
from teal.engine.weights.quantized import quantized_head
from teal.engine.weights.random import random_weights
from teal.foundation.errors import UserError
from teal.models.architectures import architecture_of
from teal.models.loading import load_model
from teal.models.placement import resolve_device
from teal.quantization import Scheme

# How projections are quantized, if at all, and whether the head is.
Format = tuple[Scheme | None, bool]


class Sources:
    """The models to measure, opened one after the other.

    Args:
        models: Folders, or names on the Hugging Face hub.
        configs: Sizes of models with random weights, in the notation of `config_of`.
        formats: Weight formats to open each model in.
        device: "auto", "cpu" or "cuda".
        dtype: Dtype of activations and of float weights.
        most_layers: Keep at most this many layers of each configuration; `None` keeps all.
        tuning: Folder of tuning tables, or "" for those of the package.

    Raises:
        UserError: There is no model, or the configuration, dtype or device is unknown.
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
        tuning: str = "",
    ) -> None:
        if not models and not configs:
            raise UserError("There is no model to measure. Give a MODEL or a --config.")
        self._number = bench_dtype(dtype)
        self._models = models
        self._configs = {name: config_of(name) for name in configs}
        for config in self._configs.values():
            layers = config.num_hidden_layers
            config.num_hidden_layers = min(layers, most_layers or layers)
        self._formats = formats
        self._device = device
        self._dtype = dtype
        self._tuning = tuning

    def benchmark_models(self, workload: Workload) -> Iterator[BenchmarkModel]:
        """Open every model in every format."""
        for name in (*self._models, *self._configs):
            for scheme, quantize_head in self._formats:
                # No variable here, which would keep the weights while the next model loads.
                yield BenchmarkModel(
                    name,
                    self._opened(name, scheme, quantize_head),
                    workload,
                    tuning=self._tuning,
                )

    def baseline_model(self, name: str, baselines: Sequence[str]) -> Any:
        """Return the Hugging Face model for the baselines, or `None` if none of them needs it."""
        if not set(baselines) - {LLAMA_CPP}:
            return None
        if name not in self._configs:
            return load_model(name, device=self._device, dtype=self._dtype)
        with torch.device(resolve_device(self._device)):
            return AutoModelForCausalLM.from_config(self._configs[name], dtype=self._number).eval()

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
            self._number,
            resolve_device(self._device),
            scheme=scheme,
            progress=progress_bar,
        )
        return OpenedModel(
            architecture=architecture,
            weight_format=weights.format,
            weights=quantized_head(weights) if quantize_head else weights,
        )
