"""Procedural radiographs with known findings and masks: the data set that comes with the program."""

from cxrjax.data.phantom.anatomy import anatomy
from cxrjax.data.phantom.population import Radiograph, population, with_findings
from cxrjax.data.phantom.rendering import masks, render

__all__ = ["Radiograph", "anatomy", "masks", "population", "render", "with_findings"]
