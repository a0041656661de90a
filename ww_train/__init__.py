"""Watch and steer the weight spectra of PyTorch networks while they train."""

from ww_train.analysis import analyze, describe, esd, measure
from ww_train.comparing.comparison import compare
from ww_train.comparing.distances import distances
from ww_train.fingers import ClipXmax, XminPeak
from ww_train.kernel_mp import KernelMP
from ww_train.marchenko_pastur import EnergyMP
from ww_train.power_law import PowerLaw, fit_power_law
from ww_train.report import LayerReport, Report
from ww_train.steering.manifold_projection import ManifoldProjection
from ww_train.steering.optim import WWPGD
from ww_train.steering.projection import Projected, Projection, SpectralProjection
from ww_train.steering.schedules import Cosine, Ramp
from ww_train.steering.tail_projection import TailProjection
from ww_train.steering.tasks import project_
from ww_train.steering.trap_projection import TrapProjection
from ww_train.tracking import AlphaTracker
from ww_train.truncated import TruncatedPowerLaw
from ww_train.weights.matrices import CheckpointError, Skipped, WeightMatrix, merge, weight_matrices
from ww_train.weightwatcher import WeightWatcher

__version__ = "0.1.0"

__all__ = [
    "WWPGD",
    "AlphaTracker",
    "CheckpointError",
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
    "WeightWatcher",
    "XminPeak",
    "analyze",
    "compare",
    "describe",
    "distances",
    "esd",
    "fit_power_law",
    "measure",
    "merge",
    "project_",
    "weight_matrices",
]
