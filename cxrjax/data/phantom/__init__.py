"""The phantom: synthetic radiographs with exactly known findings and masks."""

from cxrjax.data.phantom.anatomy import make_anatomy
from cxrjax.data.phantom.population import Radiograph, sample_population, with_findings
from cxrjax.data.phantom.rendering import render, render_masks

__all__ = ["Radiograph", "make_anatomy", "render", "render_masks", "sample_population", "with_findings"]
