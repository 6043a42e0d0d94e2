"""The content of reports: plain arrays, numbers and text, which studies and runs collect and this package draws.

Everything except the title, the findings and the scores is optional: the sections of empty fields are left out. Strings
may come from data; they are always shown as text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.explain.boxes import BoxScores
from cxrjax.explain.localisation import Localisation
from cxrjax.metrics.scores import MEAN

Row = Mapping[str, Any]
"""One score: finding, auroc, auroc_low, auroc_high, average_precision, average_precision_low, average_precision_high,
positives, negatives, reason (why a value is NaN, or which findings the mean leaves out). Or one training log line:
step, epoch, train_loss, ..."""


def by_finding(scores: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Row]]:
    """Index score rows as model -> finding -> row."""
    return {model: {row["finding"]: row for row in rows} for model, rows in scores.items()}


def number(value: Any) -> float:
    """Return a score or log value as a float; NaN for None."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Claim:
    """A statement that a study tests, its verdict and the evidence."""

    statement: str
    supported: Literal["yes", "no", "undecided"]
    evidence: str

    def __post_init__(self):
        """Check the verdict."""
        if self.supported not in ("yes", "no", "undecided"):
            raise CxrError(f"claim {self.statement!r}: supported is {self.supported!r}; use yes, no or undecided")


@dataclass(frozen=True)
class Curve:
    """A ROC curve: false positive rate f[n] and true positive rate f[n], both increasing from 0 to 1."""

    fpr: np.ndarray
    tpr: np.ndarray


@dataclass(frozen=True)
class ErfMap:
    """An effective receptive field.

    Attributes:
      map: f[H, W], >= 0, maximum 1, covering the image.
      area_fraction: fraction of the image area that holds `mass` of the map.
      diameter_px: diameter of the disc of that area, in pixels of the network's input.
      diameter_fraction: diameter / width of the image.
      theoretical_px: side of the theoretical receptive field, px; None if unknown.
      mass: fraction of the map inside the contour; 0.9545 is two standard deviations.
      gaussian_px: diameter, px, of the disc with the area of the ellipse that holds `mass` of a Gaussian fitted to the
        map; None if none was fitted.
      width_cm: width in cm of what the image shows, for the scale bar; None if unknown.
    """

    map: np.ndarray
    area_fraction: float
    diameter_px: float
    diameter_fraction: float
    theoretical_px: float | None = None
    mass: float = 0.9545
    gaussian_px: float | None = None
    width_cm: float | None = None


@dataclass(frozen=True)
class Cam:
    """A class activation map over its image.

    Attributes:
      image: uint8[H, W], the network's input.
      cam: f[h, w] in 0..1, covering the image at any resolution.
      probability: predicted probability of the finding.
      mask: bool[H', W'], the true mask; None if unknown.
      boxes: f[n, 4], detected boxes: left, top, width and height as fractions of the image's sides; None if not
        detected.
      positives: probabilities of all findings predicted above 0.5; None if not requested.
    """

    image: np.ndarray
    cam: np.ndarray
    probability: float
    mask: np.ndarray | None = None
    boxes: np.ndarray | None = None
    positives: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Reliability:
    """A binned calibration curve: mean predicted probability f[n], observed frequency f[n], number of images i[n]."""

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class Table:
    """A small table: a caption, column names, and rows of strings and numbers (floats are shown to 3 decimals)."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self):
        """Check the length of the rows."""
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise CxrError(f"table {self.caption!r}: row {number} has {len(row)} cells, not {len(self.columns)}")


@dataclass(frozen=True)
class Histogram:
    """A histogram of values in 0..1.

    Attributes:
      caption: text below it.
      values: f[n], 0 to 1.
      label: label of the horizontal axis.
      marks: name -> value, drawn as vertical lines.
    """

    caption: str
    values: np.ndarray
    label: str
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: a caption, class names, counts i[K, K], and what rows and columns are."""

    caption: str
    classes: Sequence[str]
    counts: np.ndarray
    rows: str
    columns: str


@dataclass(frozen=True)
class Diagrams:
    """Calibration curves by finding, under one caption."""

    caption: str
    curves: Mapping[str, Reliability]


@dataclass(frozen=True)
class Section:
    """An additional section of a study's page.

    Attributes:
      title: heading.
      text: paragraphs.
      figures: name (also of the file) -> content.
      tables: shown after the figures.
      details: tables that are collapsed by default.
    """

    title: str
    text: Sequence[str] = ()
    figures: Mapping[str, Histogram | Matrix | Diagrams] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()


@dataclass(frozen=True)
class StudyReport:
    """The content of a study's page.

    Attributes:
      title: page title.
      findings: K names, in the order of all tables and figures.
      sizes: S names of the single models: image sizes, smallest first, such as "32 px", or arms such as "fusion".
      scores: model (single or ensemble) -> rows of findings and of `MEAN`.
      kind: what the single models differ in, such as "image size" (whose scores a line joins) or "arm".
      ensembles: names of the ensembles of all single models, such as "stacked ensemble".
      lead: opening paragraphs.
      claims: claims that the study tests.
      notes: limits of the results, one paragraph each.
      interval: how intervals were computed, such as "95 % percentile bootstrap over patients, 1,000 resamples".
      weights: f64[K, S], weights of the stacked ensemble; each row sums to 1.
      curves: model -> finding -> Curve.
      training: single model -> log lines (step, epoch, train_loss, val_loss, val_auroc; any may be missing).
      erfs: single model -> ErfMap.
      cams: finding -> single model -> Cam.
      image_sizes: i[N, 2], width and height of the original images.
      control: a table of control runs.
      tables: further tables of scores.
      sections: additional sections, before the notes.
      provenance: nested dict: fingerprints, versions, device, seeds, timings.
    """

    title: str
    findings: Sequence[str]
    sizes: Sequence[str]
    scores: Mapping[str, Sequence[Row]]
    kind: str = "image size"
    ensembles: Sequence[str] = ()
    lead: Sequence[str] = ()
    claims: Sequence[Claim] = ()
    notes: Sequence[str] = ()
    interval: str = ""
    weights: np.ndarray | None = None
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    training: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    erfs: Mapping[str, ErfMap] = field(default_factory=dict)
    cams: Mapping[str, Mapping[str, Cam]] = field(default_factory=dict)
    image_sizes: np.ndarray | None = None
    control: Table | None = None
    tables: Sequence[Table] = ()
    sections: Sequence[Section] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Check that the fields are consistent."""
        models = (*self.sizes, *self.ensembles)
        _check_names("scores", self.scores, models)
        _check_names("curves", self.curves, models)
        _check_names("training", self.training, self.sizes)
        _check_names("erfs", self.erfs, self.sizes)
        _check_names("cams", self.cams, self.findings)
        for finding, row in self.cams.items():
            _check_names(f"cams of {finding}", row, self.sizes)
        for model, rows in self.scores.items():
            _check_names(f"scores of {model}", (row["finding"] for row in rows), (*self.findings, MEAN))
        shape = (len(self.findings), len(self.sizes))
        if self.weights is not None and np.shape(self.weights) != shape:
            raise CxrError(f"report: weights have shape {np.shape(self.weights)}, not findings x sizes {shape}")

    @property
    def models(self) -> tuple[str, ...]:
        """Single models, then ensembles, of those that have scores."""
        return tuple(name for name in (*self.sizes, *self.ensembles) if name in self.scores)


@dataclass(frozen=True)
class RunReport:
    """The content of an evaluated run's page; see `StudyReport` for the attributes, which are of one model here."""

    title: str
    findings: Sequence[str]
    scores: Sequence[Row]
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    interval: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    reliability: Mapping[str, Reliability] = field(default_factory=dict)
    training: Sequence[Row] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Check that the fields are consistent."""
        _check_names("scores", (row["finding"] for row in self.scores), (*self.findings, MEAN))
        _check_names("curves", self.curves, self.findings)
        _check_names("reliability", self.reliability, self.findings)


@dataclass(frozen=True)
class MapsReport:
    """The content of the page of a run's saliency maps.

    Attributes:
      title: page title.
      cams: finding -> name of the image -> Cam.
      located: finding, or `tables.ALL` for all pooled -> localisation scores; only findings that the data locate.
      tables: the same scores as tables.
      lead, notes, provenance: see `StudyReport`.
    """

    title: str
    cams: Mapping[str, Mapping[str, Cam]]
    located: Mapping[str, tuple[Localisation, BoxScores]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def _check_names(field: str, names: Iterable[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise CxrError(f"report: {field} names {name!r}; choose from {', '.join(allowed)}")
