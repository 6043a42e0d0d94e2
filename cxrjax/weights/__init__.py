"""Weights that others trained: read without running anything, converted strictly, and put into networks."""

from cxrjax.weights.card import Card, read_converted
from cxrjax.weights.convert import Report, convert, load_file
from cxrjax.weights.files import read_weights
from cxrjax.weights.start import Converted, load_converted, start_from

__all__ = [
    "Card", "Converted", "Report", "convert", "load_converted", "load_file", "read_converted", "read_weights",
    "start_from",
]  # fmt: skip
