"""Training-free activation sparsity: make a pretrained LLM decode faster by skipping channels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teal.allocation import allocate
    from teal.calibration import CalibrationStats, calibrate, import_teal
    from teal.data import token_windows
    from teal.engine.engine import Engine
    from teal.evaluation import evaluate
    from teal.foundation.version import __version__
    from teal.models.loading import load_model, load_tokenizer
    from teal.plan import SparsityPlan
    from teal.sparsification import densify, measure_sparsity, sparsify

# Loaded on first use: `import teal` alone does not import torch.
_HOMES = {
    "CalibrationStats": "teal.calibration",
    "Engine": "teal.engine.engine",
    "SparsityPlan": "teal.plan",
    "__version__": "teal.foundation.version",
    "allocate": "teal.allocation",
    "calibrate": "teal.calibration",
    "densify": "teal.sparsification",
    "evaluate": "teal.evaluation",
    "import_teal": "teal.calibration",
    "load_model": "teal.models.loading",
    "load_tokenizer": "teal.models.loading",
    "measure_sparsity": "teal.sparsification",
    "sparsify": "teal.sparsification",
    "token_windows": "teal.data",
}

__all__ = [
    "CalibrationStats",
    "Engine",
    "SparsityPlan",
    "__version__",
    "allocate",
    "calibrate",
    "densify",
    "evaluate",
    "import_teal",
    "load_model",
    "load_tokenizer",
    "measure_sparsity",
    "sparsify",
    "token_windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'teal' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
