"""The six exclusive classes of the mixture of ChestX-ray14 and public COVID-19 images."""

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
    """Radiographs in folders of six classes; NIH's are known by their names, with patient and study."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 - as TFDS wants it

    def named(self, folder: Path) -> str:
        """The class of a folder, whether it is written with capitals, spaces or underscores."""
        for name in SIX_CLASS:
            if re.sub("[ _-]", "", folder.name).casefold() == name.replace("-", "").casefold():
                return name
        raise CxrError(f"{folder} is none of the six classes; they are {', '.join(SIX_CLASS)}")

    def classes(self) -> tuple[str, ...]:
        """Always the six, in the order of the labels."""
        if not self.folders:
            raise CxrError(f"no folder of a class; they are {', '.join(SIX_CLASS)}")
        return SIX_CLASS

    def described(self, record: Record, path: Path) -> Record:
        """The record with what NIH's file names say."""
        if named := _NIH.fullmatch(path.stem):
            return replace(record, patient=named[1], study=path.stem, source=nih.SOURCE)
        return replace(record, source="not NIH")
