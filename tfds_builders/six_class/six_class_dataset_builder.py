"""TFDS builder of six exclusive classes from ChestX-ray14 and public COVID-19 images."""

import re
from dataclasses import replace
from pathlib import Path

import tensorflow_datasets as tfds

from cxrjax.data.records import Record
from cxrjax.errors import CxrError
from cxrjax.findings import SIX_CLASS
from tfds_builders.chestxray14 import nih
from tfds_builders.folder.folder_dataset_builder import Builder as Folder

_NIH = re.compile(r"(\d{8})_(\d{3})")


class Builder(Folder):
    """Radiographs in folders of six classes; NIH file names give patient and study."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - required by TFDS

    def class_of(self, folder: Path) -> str:
        """Return the class of a folder, ignoring case, spaces, underscores and hyphens."""
        for name in SIX_CLASS:
            if re.sub("[ _-]", "", folder.name).casefold() == name.replace("-", "").casefold():
                return name
        raise CxrError(f"{folder} is not one of the six classes {', '.join(SIX_CLASS)}")

    def classes(self) -> tuple[str, ...]:
        """Return the six classes, in the order of the labels."""
        if not self.folders:
            raise CxrError(f"no class folder; the classes are {', '.join(SIX_CLASS)}")
        return SIX_CLASS

    def with_file_name_metadata(self, record: Record, path: Path) -> Record:
        """Return the record with patient and study from an NIH file name."""
        if match := _NIH.fullmatch(path.stem):
            return replace(record, patient=match[1], study=path.stem, source=nih.SOURCE)
        return replace(record, source="not NIH")
