"""The ops, each on the path that ``ops_choice.py`` picks for device and dtype.

Every op has its oracle in ``kernels/reference.py``. ``force`` pins a path, ``calls`` tells what
ran; inputs are checked once, on the host.
"""

from mimic_fast.kernels.engine import Clone, Target, Terms
from mimic_fast.kernels.live import LiveLosses
from mimic_fast.kernels.reference import (
    MISSING,
    attention_map,
    counted_information,
    nt_xent,
)
from mimic_fast.kernels.trunk import LayerLosses
from mimic_fast.ops_choice import (
    OPS,
    PATHS,
    Choice,
    Op,
    Path,
    PathError,
    calls,
    choose,
    force,
    force_for_run,
)
from mimic_fast.ops_histogram import (
    cross_histogram,
    cross_information,
    edge_codes,
    equal_mass_codes,
    joint_histogram,
    matched_information,
)
from mimic_fast.ops_loss import (
    attention_loss,
    clone_loss,
    compiled_losses,
    layer_losses,
    power_maps,
    tapped_losses,
)

__all__ = [
    "MISSING",
    "OPS",
    "PATHS",
    "Choice",
    "Clone",
    "LayerLosses",
    "LiveLosses",
    "Op",
    "Path",
    "PathError",
    "Target",
    "Terms",
    "attention_loss",
    "attention_map",
    "calls",
    "choose",
    "clone_loss",
    "compiled_losses",
    "counted_information",
    "cross_histogram",
    "cross_information",
    "edge_codes",
    "equal_mass_codes",
    "force",
    "force_for_run",
    "joint_histogram",
    "layer_losses",
    "matched_information",
    "nt_xent",
    "power_maps",
    "tapped_losses",
]
