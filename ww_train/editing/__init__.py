"""Changing the weights of a finished model: smoothing, removing traps, rewriting files."""

from ww_train.editing.rules import AboveBulk, Bottom, DetXTail, PowerLawTail, Top
from ww_train.editing.smoothing import smooth_checkpoint, smoothed, svd_smoothing_
from ww_train.editing.trap_removal import remove_traps_

__all__ = [
    "AboveBulk",
    "Bottom",
    "DetXTail",
    "PowerLawTail",
    "Top",
    "remove_traps_",
    "smooth_checkpoint",
    "smoothed",
    "svd_smoothing_",
]
