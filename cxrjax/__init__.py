"""Chest X-ray classifiers at full resolution, and studies of which resolution each finding needs."""

__version__ = "0.1.0"
