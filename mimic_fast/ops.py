"""The one place that picks an implementation for each op.

Every op has its oracle in ``kernels/reference.py``; a faster form is chosen here and nowhere else.
"""

from mimic_fast.kernels.reference import (
    attention_loss,
    attention_map,
    clone_loss,
    joint_histogram,
    nt_xent,
)

__all__ = ["attention_loss", "attention_map", "clone_loss", "joint_histogram", "nt_xent"]
