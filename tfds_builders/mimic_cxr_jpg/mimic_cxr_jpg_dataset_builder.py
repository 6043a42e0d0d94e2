"""TFDS builder of MIMIC-CXR-JPG, from PhysioNet's files for credentialed users."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.errors import CxrError
from cxrjax.findings import CHEXPERT14
from tfds_builders.builder import size_configs
from tfds_builders.mimic_cxr_jpg import tables
from tfds_builders.sources import FileBuilder, Selection, find_files, match_images


class Builder(FileBuilder):
    """MIMIC-CXR-JPG: 377,110 radiographs of 227,827 studies, 14 findings from their reports."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - required by TFDS
    BUILDER_CONFIGS = size_configs(None, 2048, 1024, 512, 256, 224)
    FINDINGS = CHEXPERT14
    ENCODING = "jpeg"
    PUBLISHED_COUNTS = MappingProxyType(
        {"images": 377_110, "patients": 65_379, "train": 368_960, "validation": 2_991, "test": 5_159}
    )

    def __init__(self, *, source: Path | str | None = None, labels: str = "chexpert", **kwargs: Any):
        """Make the builder.

        Args:
          source: folder with PhysioNet's files, at any depth.
          labels: the labeller, "chexpert" or "negbio".
          **kwargs: allow_missing, workers, data_dir, config, version.

        Raises:
          CxrError: `source` is missing, or the labeller is unknown.
        """
        if source is None:
            raise CxrError(
                f"MIMIC-CXR-JPG is for credentialed users and cannot be downloaded automatically; get it from "
                f"{tables.PAGE} and pass its folder as --source"
            )
        if labels not in tables.LABELLERS:
            raise CxrError(f"labels {labels!r} are not in MIMIC-CXR-JPG; choose {' or '.join(tables.LABELLERS)}")
        self.labels = labels
        super().__init__(source=source, **kwargs)

    @property
    def options(self) -> dict[str, Any]:
        """Options that determine the content."""
        return {**super().options, "labels": self.labels}

    def select(self) -> Selection:
        """Match the tables with the images, which may be anywhere below the source folder."""
        assert self.source is not None
        files = find_files(self.source, (".jpg",), "PhysioNet's files")
        content = tables.read_tables(files, self.source, self.labels)
        images = {Path(name).stem: path for name, path in files.items() if name.lower().endswith(".jpg")}
        selection = match_images(content.records, images, self.source, self.allow_missing)
        selection.sizes.update(content.sizes)
        prepared = {record.study for record in selection.records}
        if unlabelled := [study for study in content.unlabelled if study in prepared]:
            example = f"no {self.labels} labels for {len(unlabelled):,} studies, such as {unlabelled[0]}"
            selection.notes.append(f"{example}: all their findings are not mentioned")
        if viewless := sum(id in images for id in content.viewless):
            selection.notes.append(f"no metadata for {viewless:,} images: their view is unknown")
        return selection
