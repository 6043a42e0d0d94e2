"""ChestX-ray14 of the NIH Clinical Center, from its published files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.errors import CxrError
from cxrjax.findings import NIH14
from tfds_builders.chestxray14 import download, nih
from tfds_builders.radiographs import Radiographs, Stored, sizes, stored_file


@dataclass(frozen=True)
class Selection:
    """Which records are prepared, and what does not match.

    Attributes:
      records: rows of the table whose image is there.
      paths: their images.
      missing: ids of rows without an image.
      unlisted: names of images without a row.
    """

    records: list[Record]
    paths: nih.Files
    missing: list[str]
    unlisted: list[str]

    @property
    def subset(self) -> bool:
        """Whether most of the table's images are absent, so that the source must be meant as a subset."""
        return len(self.missing) > len(self.records)


def select(files: nih.Files, source: object, allow_missing: bool) -> Selection:
    """Match the label table with the images that are there.

    A source with less than half of the table's images is taken for what it is, a subset. With half of them or more it
    is meant to be the archive, and an image that is missing is an error, unless `allow_missing`; so is always an image
    that the table does not list.

    Raises:
      CxrError: counts and names what does not match, or says what is wrong with the files.
    """
    paths = nih.images(files, source)
    table = nih.read_records(files, source)
    found = Selection(
        [record for record in table if record.id in paths],
        paths,
        [record.id for record in table if record.id not in paths],
        sorted(paths.keys() - {record.id for record in table}),
    )
    if not found.records:
        raise CxrError(f"none of the {len(paths):,} images below {source} is in the label table, such as {min(paths)}")
    mend = "; complete the source, or pass --allow-missing to go on without"
    if found.missing and not found.subset and not allow_missing:
        raise CxrError(
            f"{len(found.missing):,} of the table's {len(table):,} images are not below {source}: "
            f"{_some(found.missing)}{mend}"
        )
    if found.unlisted and not allow_missing:
        raise CxrError(
            f"{len(found.unlisted):,} images below {source} are not in the table: {_some(found.unlisted)}{mend}"
        )
    return found


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


class Builder(Radiographs):
    """ChestX-ray14: 112,120 frontal radiographs of 30,805 patients, 14 findings.

    Attributes:
      selection: after preparing, what was prepared and what does not match.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - as TFDS wants it
    BUILDER_CONFIGS = sizes(None, 1024, 512, 256, 224)
    FINDINGS = NIH14
    ENCODING = "jpeg"

    def __init__(self, *, source: Path | str | None = None, allow_missing: bool = False, **kwargs: Any):
        """Makes the builder.

        Args:
          source: folder with NIH's files, images in any folders below; None downloads them (42 GB).
          allow_missing: go on if images of the table are missing, or images are not in the table.
          **kwargs: workers, data_dir, config, version.
        """
        self.source = None if source is None else Path(source)
        self.allow_missing = allow_missing
        self.selection: Selection | None = None
        super().__init__(**kwargs)

    def select(self) -> Selection:
        """What would be prepared from the source folder."""
        assert self.source is not None
        return select(nih.find_files(self.source), self.source, self.allow_missing)

    def _records(self, dl_manager: tfds.download.DownloadManager) -> Sequence[Record]:
        if self.source is None:
            self.selection = select(download.fetch(dl_manager), "the download", self.allow_missing)
        else:
            self.selection = self.select()
        return self.selection.records

    def _store(self, record: Record) -> Stored:
        assert self.selection is not None
        return stored_file(self.selection.paths[record.id], self.size, self.ENCODING)
