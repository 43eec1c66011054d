"""Statistics of a model's activations, measured on text or imported."""

from teal.calibration.allocation_path import AllocationPath
from teal.calibration.artifact import CalibrationStats
from teal.calibration.collector import calibrate
from teal.calibration.teal_import import import_teal

__all__ = ["AllocationPath", "CalibrationStats", "calibrate", "import_teal"]
