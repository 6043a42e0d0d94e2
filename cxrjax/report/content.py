"""What a report says: plain arrays, numbers and words, gathered by a study or a run; this package only draws them.

Every part but the title, the findings and the scores may be left out (empty or None): its section is then absent.
All strings may come from data: they are shown as text, whatever they contain.
"""

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


@dataclass(frozen=True)
class Claim:
    """A statement that the study was to test, and what came of it."""

    statement: str
    supported: Literal["yes", "no", "undecided"]
    evidence: str

    def __post_init__(self):
        """Refuse a fourth verdict."""
        if self.supported not in ("yes", "no", "undecided"):
            raise CxrError(f"claim {self.statement!r}: supported is {self.supported!r}; use yes, no or undecided")


@dataclass(frozen=True)
class Curve:
    """A receiver operating characteristic: fpr f[n] and tpr f[n], both rising from 0 to 1."""

    fpr: np.ndarray
    tpr: np.ndarray


@dataclass(frozen=True)
class ErfMap:
    """An effective receptive field.

    Attributes:
      map: f[H, W], >= 0, maximum 1, in the frame of the image.
      area_fraction: area holding `mass` of the map over the area of the image.
      diameter_px: diameter of the circle of that area, in pixels of the network's input.
      diameter_fraction: the same over the width of the image.
      theoretical_px: side of the theoretical receptive field in pixels; None where unknown.
      mass: share of the map inside the contour; 0.9545 is two standard deviations.
      gaussian_px: diameter of the circle as large as the ellipse that holds `mass` of the Gaussian fitted to the map;
        None where none was fitted.
      width_cm: of what the image shows, for the scale bar; None where unknown.
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
      image: uint8[H, W], as the network saw it.
      cam: f[h, w] in 0..1, of the image's frame at any resolution.
      probability: what the network said of this finding.
      mask: bool[H', W'], where the finding truly is; None where unknown.
      boxes: f[n, 4], what the map marks: left, top, width and height as fractions of the image's sides; None where
        boxes were not looked for.
      said: all findings that the network gives more than one half, with their probabilities; None where not asked.
    """

    image: np.ndarray
    cam: np.ndarray
    probability: float
    mask: np.ndarray | None = None
    boxes: np.ndarray | None = None
    positives: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Reliability:
    """A calibration curve in bins: mean predicted probability f[n], observed frequency f[n], number of images i[n]."""

    predicted: np.ndarray
    observed: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class Table:
    """Any small table: a caption, column names, and rows of strings and numbers (floats are shown to 3 decimals)."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self):
        """Refuse ragged rows."""
        for number, row in enumerate(self.rows, 1):
            if len(row) != len(self.columns):
                raise CxrError(f"table {self.caption!r}: row {number} has {len(row)} cells, not {len(self.columns)}")


@dataclass(frozen=True)
class Histogram:
    """How often values in 0..1 occur.

    Attributes:
      caption: a sentence for below it.
      values: f[n], 0 to 1.
      label: of the horizontal axis.
      marks: name -> value, drawn as upright lines.
    """

    caption: str
    values: np.ndarray
    label: str
    marks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: a caption, class names, counts i[K, K], and what its rows and columns are."""

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
    """A chapter of a study's page that other studies do not have.

    Attributes:
      title: its heading.
      text: paragraphs.
      figures: name (of the file, too) -> what is drawn.
      tables: shown after the figures.
      details: tables that are folded away until asked for.
    """

    title: str
    text: Sequence[str] = ()
    figures: Mapping[str, Histogram | Matrix | Diagrams] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()


@dataclass(frozen=True)
class StudyReport:
    """Everything that the page of a study shows.

    Attributes:
      title: of the page.
      findings: K names, in the order of all tables and figures.
      sizes: S names of the single models: image sizes, smallest first, such as "32 px", or arms such as "fusion".
      scores: model (a single one or an ensemble) -> rows of findings and of `MEAN`.
      kind: what the single models differ in, such as "image size" (whose scores a line joins) or "arm".
      ensembles: names of the models made of all single ones, such as "stacked ensemble".
      lead: opening paragraphs.
      claims: what was to be shown.
      notes: what this does and does not prove, one paragraph each.
      interval: how the intervals were made, such as "95 % percentile bootstrap over patients, 1,000 resamples".
      weights: f64[K, S], the stacked ensemble's weights, each row summing to 1.
      curves: model -> finding -> Curve.
      training: single model -> log lines (step, epoch, train_loss, val_loss, val_auroc; any may be missing).
      fields: single model -> Field.
      cams: finding -> single model -> Cam.
      image_sizes: i[N, 2], width and height of the original images.
      control: a table of control runs.
      tables: any others that belong to the scores.
      sections: what else there is to say, after all the rest but the notes.
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
        """Refuse parts that do not fit together."""
        models = (*self.sizes, *self.ensembles)
        _known("scores", self.scores, models)
        _known("curves", self.curves, models)
        _known("training", self.training, self.sizes)
        _known("fields", self.erfs, self.sizes)
        _known("cams", self.cams, self.findings)
        for finding, row in self.cams.items():
            _known(f"cams of {finding}", row, self.sizes)
        for model, rows in self.scores.items():
            _known(f"scores of {model}", (row["finding"] for row in rows), (*self.findings, MEAN))
        shape = (len(self.findings), len(self.sizes))
        if self.weights is not None and np.shape(self.weights) != shape:
            raise CxrError(f"report: weights have shape {np.shape(self.weights)}, not findings x sizes {shape}")

    @property
    def models(self) -> tuple[str, ...]:
        """Single models, then ensembles: those that have scores."""
        return tuple(name for name in (*self.sizes, *self.ensembles) if name in self.scores)


@dataclass(frozen=True)
class RunReport:
    """Everything that the page of one evaluated run shows; the attributes are those of `StudyReport`, for one model."""

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
        """Refuse parts that do not fit together."""
        _known("scores", (row["finding"] for row in self.scores), (*self.findings, MEAN))
        _known("curves", self.curves, self.findings)
        _known("reliability", self.reliability, self.findings)


@dataclass(frozen=True)
class MapsReport:
    """Everything that the page of one run's saliency maps shows.

    Attributes:
      title: of the page.
      cams: finding -> name of the image -> Cam.
      located: finding, and `ALL` for all of them pooled -> how well maps point and boxes fit; without those that the
        data do not locate.
      tables: of the same.
      lead, notes, provenance: as in `StudyReport`.
    """

    title: str
    cams: Mapping[str, Mapping[str, Cam]]
    located: Mapping[str, tuple[Localisation, BoxScores]] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def _known(part: str, names: Iterable[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise CxrError(f"report: {part} names {name!r}, which is none of {', '.join(allowed)}")
