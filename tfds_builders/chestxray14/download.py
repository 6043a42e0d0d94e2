"""Download ChestX-ray14 from NIH's site with TFDS's download manager."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import tensorflow_datasets as tfds

from cxrjax.errors import CxrError
from tfds_builders.chestxray14 import nih

# Keys from batch_download_zips.py on NIH's page; MD5 digests from its FAQ_CHESTXRAY.pdf, question 7.
ARCHIVES = {
    "images_001.tar.gz": ("vfk49d74nhbxq3nqjg0900w5nvkorp5c", "fe8ed0a6961412fddcbb3603c11b3698"),
    "images_002.tar.gz": ("i28rlmbvmfjbl8p2n3ril0pptcmcu9d1", "ab07a2d7cbe6f65ddd97b4ed7bde10bf"),
    "images_003.tar.gz": ("f1t00wrtdk94satdfb9olcolqx20z2jp", "2301d03bde4c246388bad3876965d574"),
    "images_004.tar.gz": ("0aowwzs5lhjrceb3qp67ahp0rd1l1etg", "9f1b7f5aae01b13f4bc8e2c44a4b8ef6"),
    "images_005.tar.gz": ("v5e3goj22zr6h8tzualxfsqlqaygfbsn", "1861f3cd0ef7734df8104f2b0309023b"),
    "images_006.tar.gz": ("asi7ikud9jwnkrnkj99jnpfkjdes7l6l", "456b53a8b351afd92a35bc41444c58c8"),
    "images_007.tar.gz": ("jn1b4mw4n6lnh74ovmcjb8y48h8xj07n", "1075121ea20a137b87f290d6a4a5965e"),
    "images_008.tar.gz": ("tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j", "b61f34cec3aa69f295fbb593cbd9d443"),
    "images_009.tar.gz": ("upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj", "442a3caa61ae9b64e61c561294d1e183"),
    "images_010.tar.gz": ("l6nilvfa9cg3s28tqv1qc1olm3gnz54p", "09ec81c4c31e32858ad8cf965c494b74"),
    "images_011.tar.gz": ("hhq8fkdgvcari67vfhs7ppg2w6ni4jze", "499aefc67207a5a97692424cf5dbeed5"),
    "images_012.tar.gz": ("ioqwiy20ihqwyr8pf4c24eazhh281pbu", "dc9fda1757c2de0032b63347a7d2895c"),
}
_ARCHIVE = "https://nihcc.box.com/shared/static/{}.gz"

# File numbers on NIH's page; checksums.tsv has the sizes and sha256 digests.
TABLES = {
    nih.TABLES[0]: 219760887468,
    nih.BOXES: 219760940956,
    nih.TRAIN_VAL_LIST: 256056636701,
    nih.TEST_LIST: 256055473534,
}
_TABLE = "https://nihcc.app.box.com/index.php?rm=box_download_shared_file&vanity_name=ChestXray-NIHCC&file_id=f_{}"


def urls() -> dict[str, str]:
    """Return the URL of each published file."""
    archives = {name: _ARCHIVE.format(key) for name, (key, _) in ARCHIVES.items()}
    return {**{name: _TABLE.format(number) for name, number in TABLES.items()}, **archives}


def fetch(dl_manager: tfds.download.DownloadManager) -> nih.Files:
    """Download and check missing files, unpack the archives next to themselves, and return all files by name.

    Raises:
      CxrError: a file cannot be downloaded or differs from the published one; the message says what to download by
        hand.
    """
    paths: nih.Files = {}
    for name, url in urls().items():
        try:
            paths[name] = Path(dl_manager.download(url))
        except Exception as error:  # from the network, the site or TFDS's checksum
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CxrError(_describe_failure(name, reason)) from error
    files = {name: paths[name] for name in TABLES}
    for name, (_, md5) in ARCHIVES.items():
        files |= nih.select_images(nih.find_files(_unpack(paths[name], name, md5)), name)
    return files


def _unpack(archive: Path, name: str, md5: str) -> Path:
    """Unpack an archive atomically, if it is not unpacked yet."""
    folder = archive.with_name(f"{archive.name}.unpacked")
    if folder.is_dir():
        return folder
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != md5:
            raise CxrError(_describe_failure(name, f"{archive} is not the published file (MD5 differs); delete it"))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        temporary.rename(folder)
    except (tarfile.TarError, EOFError) as error:
        raise CxrError(_describe_failure(name, f"{archive} cannot be unpacked: {error}; delete it")) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _describe_failure(name: str, reason: str) -> str:
    return (
        f"{name} of ChestX-ray14: {reason}. Try again, or download by hand from {nih.PAGE} {', '.join(TABLES)} and "
        "images_001 to images_012.tar.gz, unpack them, and pass the folder as --source"
    )
