"""The list of a prepared data set's files with their sizes and checksums, and comparing them with what is there."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cxrjax.errors import CxrError
from cxrjax.files import write_json

MANIFEST = "shards.json"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was written.

    Attributes:
      file: its name.
      records: how many it holds.
      bytes: its size.
      sha256: hex digest of the file.
    """

    file: str
    records: int
    bytes: int
    file_sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards of a prepared data set in their order, and the hex digest of its table of records."""

    table: str
    shards: tuple[ShardEntry, ...]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Put the manifest beside the shards."""
    write_json(directory / MANIFEST, asdict(manifest))


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a prepared data set; None for data prepared before there was one.

    Raises:
      CxrError: it is damaged.
    """
    path = directory / MANIFEST
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(read["table"], tuple(ShardEntry(**entry) for entry in read["shards"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CxrError(f"{path} cannot be read ({error}); delete {directory} and prepare it again") from error


def find_truncated(directory: Path, manifest: Manifest) -> dict[str, str]:
    """The shards whose size is another than was written, and what is wrong with each; cheap."""
    wrong = {}
    for entry in manifest.shards:
        try:
            size = os.stat(directory / entry.file).st_size
        except OSError:
            wrong[entry.file] = "missing"
            continue
        if size != entry.bytes:
            wrong[entry.file] = f"{size:,} bytes instead of {entry.bytes:,}"
    return wrong


def find_damage(
    directory: Path, manifest: Manifest, *, workers: int | None = None, advance: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """The shards that are not as they were written, and what is wrong with each; reads all of every shard."""
    wrong = find_truncated(directory, manifest)

    def check(entry: ShardEntry) -> bool:
        whole = entry.file not in wrong and file_sha256(directory / entry.file) == entry.sha256
        advance()
        return whole

    with ThreadPoolExecutor(workers) as pool:
        whole = list(pool.map(check, manifest.shards))
    for entry, good in zip(manifest.shards, whole, strict=True):
        if not good:
            wrong.setdefault(entry.file, "checksum differs")
    return wrong


def describe_damage(wrong: dict[str, str], most: int = 5) -> str:
    """What is wrong with the first few shards, and how many more there are."""
    shown: Sequence[str] = [f"{file} ({what})" for file, what in sorted(wrong.items())]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most:,} more" if len(shown) > most else "")


def file_sha256(path: Path) -> str:
    """Hex digest of a file; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
