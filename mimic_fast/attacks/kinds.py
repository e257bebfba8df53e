"""The attacks by name, each loaded when it is asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mimic_fast.config import Frozen
from mimic_fast.errors import UsageError

_SETTINGS = {
    "badencoder": "BadEncoderSettings",
    "drupe": "DrupeSettings",
    "inactive": "InactiveSettings",
    "adaptive": "AdaptiveSettings",
    "ctrl": "CtrlSettings",
    "sslbkd": "SslbkdSettings",
}
KINDS = tuple(_SETTINGS)


def attack_of(kind: str) -> tuple[type[Frozen], Callable[..., Any]]:
    """Settings and function of an attack: ``function(settings, report=..., stop=...)``.

    Raises:
        UsageError: If there is no attack of this name.
    """
    if kind not in _SETTINGS:
        raise UsageError(f"there is no attack {kind!r}; there are {', '.join(KINDS)}")
    module = import_module(f"mimic_fast.attacks.{kind}")
    return getattr(module, _SETTINGS[kind]), getattr(module, kind)
