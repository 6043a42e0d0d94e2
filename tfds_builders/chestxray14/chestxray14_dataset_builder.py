"""TFDS builder of ChestX-ray14 of the NIH Clinical Center."""

from collections.abc import Sequence
from types import MappingProxyType

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.findings import NIH14
from tfds_builders.builder import size_configs
from tfds_builders.chestxray14 import download, nih
from tfds_builders.sources import FileBuilder, Selection, match_images


def select(files: nih.Files, source: object, allow_missing: bool) -> Selection:
    """Match the label table with the image files; see `sources.match_images`."""
    paths = nih.select_images(files, source)
    return match_images(nih.read_records(files, source), paths, source, allow_missing)


class Builder(FileBuilder):
    """ChestX-ray14: 112,120 frontal radiographs of 30,805 patients, 14 findings."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - required by TFDS
    BUILDER_CONFIGS = size_configs(None, 2048, 1024, 512, 256, 224)
    FINDINGS = NIH14
    ENCODING = "jpeg"
    PUBLISHED_COUNTS = MappingProxyType({"images": 112_120, "patients": 30_805, "train_val": 86_524, "test": 25_596})

    def select(self) -> Selection:
        """Match the table with the images, which may be anywhere below the source folder."""
        assert self.source is not None
        return select(nih.find_files(self.source), self.source, self.allow_missing)

    def _read_records(self, dl_manager: tfds.download.DownloadManager | None) -> Sequence[Record]:
        if self.source is not None:
            return super()._read_records(dl_manager)
        if dl_manager is None:
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            dl_manager = self._make_download_manager(download_dir=None, download_config=config)
        self.selection = select(download.fetch(dl_manager), "the download", self.allow_missing)
        return self.selection.records
