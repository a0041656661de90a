"""Watch and steer the weight spectra of PyTorch networks while they train."""

from ww_train.analysis import analyze, describe, esd, measure
from ww_train.fingers import ClipXmax, XminPeak
from ww_train.kernel_mp import KernelMP
from ww_train.manifold_projection import ManifoldProjection
from ww_train.marchenko_pastur import EnergyMP
from ww_train.matrices import Skipped, WeightMatrix, weight_matrices
from ww_train.optim import WWPGD
from ww_train.power_law import PowerLaw, fit_power_law
from ww_train.projection import Projected, Projection, SpectralProjection
from ww_train.report import LayerReport, Report
from ww_train.schedules import Cosine, Ramp
from ww_train.steering import project_
from ww_train.tail_projection import TailProjection
from ww_train.trap_projection import TrapProjection
from ww_train.truncated import TruncatedPowerLaw

__version__ = "0.1.0"

__all__ = [
    "WWPGD",
    "ClipXmax",
    "Cosine",
    "EnergyMP",
    "KernelMP",
    "LayerReport",
    "ManifoldProjection",
    "PowerLaw",
    "Projected",
    "Projection",
    "Ramp",
    "Report",
    "Skipped",
    "SpectralProjection",
    "TailProjection",
    "TrapProjection",
    "TruncatedPowerLaw",
    "WeightMatrix",
    "XminPeak",
    "analyze",
    "describe",
    "esd",
    "fit_power_law",
    "measure",
    "project_",
    "weight_matrices",
]
