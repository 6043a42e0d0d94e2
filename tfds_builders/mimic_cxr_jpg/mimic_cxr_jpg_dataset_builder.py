"""MIMIC-CXR-JPG, from the files that PhysioNet gives to credentialed users."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.errors import CxrError
from cxrjax.findings import CHEXPERT14
from tfds_builders.builder import sizes
from tfds_builders.mimic_cxr_jpg import tables
from tfds_builders.sources import FromFiles, Selection, find_files, match


class Builder(FromFiles):
    """MIMIC-CXR-JPG: 377,110 radiographs of 227,827 studies, 14 findings from their reports."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - as TFDS wants it
    BUILDER_CONFIGS = sizes(None, 2048, 1024, 512, 256, 224)
    FINDINGS = CHEXPERT14
    ENCODING = "jpeg"
    PUBLISHED = MappingProxyType(
        {"images": 377_110, "patients": 65_379, "train": 368_960, "validation": 2_991, "test": 5_159}
    )

    def __init__(self, *, source: Path | str | None = None, labels: str = "chexpert", **kwargs: Any):
        """Makes the builder.

        Args:
          source: folder with PhysioNet's files, in any folders below.
          labels: the labeller, "chexpert" or "negbio".
          **kwargs: allow_missing, workers, data_dir, config, version.

        Raises:
          CxrError: no source, or another labeller.
        """
        if source is None:
            raise CxrError(
                f"MIMIC-CXR-JPG is for credentialed users and cannot be downloaded here: get it from {tables.PAGE}, "
                "and pass its folder as --source"
            )
        if labels not in tables.LABELLERS:
            raise CxrError(f"labels {labels!r} are not in MIMIC-CXR-JPG; choose {' or '.join(tables.LABELLERS)}")
        self.labels = labels
        super().__init__(source=source, **kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """What the content depends on."""
        return {**super().options, "labels": self.labels}

    def select(self) -> Selection:
        """Match the tables with the images, which are found by their names anywhere below the source."""
        assert self.source is not None
        files = find_files(self.source, (".jpg",), "PhysioNet's files")
        read = tables.read(files, self.source, self.labels)
        images = {Path(name).stem: path for name, path in files.items() if name.lower().endswith(".jpg")}
        found = match(read.records, images, self.source, self.allow_missing)
        found.sizes.update(read.sizes)
        prepared = {record.study for record in found.records}
        if unlabelled := [study for study in read.unlabelled if study in prepared]:
            first = f"no {self.labels} labels for {len(unlabelled):,} studies, such as {unlabelled[0]}"
            found.notes.append(f"{first}: their findings are all not mentioned")
        if viewless := sum(id in images for id in read.viewless):
            found.notes.append(f"no metadata for {viewless:,} images: their view is unknown")
        return found
