"""Watch and steer the weight spectra of PyTorch networks while they train."""

from ww_train.analysis import LayerReport, Report, analyze, measure
from ww_train.matrices import Skipped, WeightMatrix, weight_matrices
from ww_train.optim import WWPGD, Ramp
from ww_train.projection import ManifoldProjection, Projected, Projection

__version__ = "0.1.0"

__all__ = [
    "WWPGD",
    "LayerReport",
    "ManifoldProjection",
    "Projected",
    "Projection",
    "Ramp",
    "Report",
    "Skipped",
    "WeightMatrix",
    "analyze",
    "measure",
    "weight_matrices",
]
