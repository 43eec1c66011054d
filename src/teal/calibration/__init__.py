"""What the activations of a model look like: measured on text, or imported."""

from teal.calibration.collector import calibrate
from teal.calibration.path import AllocationPath
from teal.calibration.stats import CalibrationStats
from teal.calibration.teal_import import import_teal

__all__ = ["AllocationPath", "CalibrationStats", "calibrate", "import_teal"]
