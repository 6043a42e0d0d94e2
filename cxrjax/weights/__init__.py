"""Published weights: read without running anything in them, converted strictly, and put into networks."""

from cxrjax.weights.convert import ConversionReport, convert
from cxrjax.weights.converted import Card, Converted, init_from_converted, load_converted, read_converted

__all__ = [
    "Card", "ConversionReport", "Converted", "convert", "init_from_converted", "load_converted", "read_converted",
]  # fmt: skip
