"""Weights that others trained: read without running anything, converted strictly, and put into networks."""

from cxrjax.weights.convert import Report, convert, load_file
from cxrjax.weights.converted import Card, Converted, load_converted, read_converted, start_from
from cxrjax.weights.files import read_weights

__all__ = [
    "Card", "Converted", "Report", "convert", "load_converted", "load_file", "read_converted", "read_weights",
    "start_from",
]  # fmt: skip
