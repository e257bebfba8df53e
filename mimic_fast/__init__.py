"""Purify backdoored pre-trained vision encoders (MIMIC, arXiv:2406.03508).

The public names below load on first use, so that ``import mimic_fast`` imports no torch.
"""

from importlib import import_module
from typing import Any

from mimic_fast.version import __version__

_PUBLIC = {
    "Settings": "mimic_fast.config",
    "load_settings": "mimic_fast.recipe",
    "purify": "mimic_fast.distil",
    "locate": "mimic_fast.mutual_information.locate",
    "load_encoder": "mimic_fast.encoders.ingest",
    "build_encoder": "mimic_fast.encoders.build",
    "evaluate_encoders": "mimic_fast.evaluation.evaluate",
    "badencoder": "mimic_fast.attacks.badencoder",
    "pretrain": "mimic_fast.pretraining",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mimic_fast' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
