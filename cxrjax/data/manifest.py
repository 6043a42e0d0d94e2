"""The manifest of a prepared data set: its shards with sizes and checksums, and checks of the files against it."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from cxrjax.errors import CxrError, list_some
from cxrjax.files import write_json

MANIFEST = "shards.json"


@dataclass(frozen=True)
class ShardEntry:
    """A shard as it was written: file name, number of records, file size in bytes, and hex digest of the file."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The sha256 of the table of records, and the shards of a prepared data set in order."""

    table: str
    shards: tuple[ShardEntry, ...]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest of a prepared data set."""
    write_json(directory / MANIFEST, asdict(manifest))


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a prepared data set.

    Raises:
      CxrError: it is missing or damaged.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(content["table"], tuple(ShardEntry(**entry) for entry in content["shards"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CxrError(f"{path} cannot be read ({error}); delete {directory} and prepare it again") from error


def find_truncated(directory: Path, manifest: Manifest) -> dict[str, str]:
    """Describe the shards that are missing or have another size, by file name; does not read them."""
    damage = {}
    for entry in manifest.shards:
        try:
            size = (directory / entry.file).stat().st_size
        except OSError:
            damage[entry.file] = "missing"
            continue
        if size != entry.bytes:
            damage[entry.file] = f"{size:,} bytes instead of {entry.bytes:,}"
    return damage


def find_damage(
    directory: Path, manifest: Manifest, *, workers: int | None = None, advance: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Describe the shards that differ from the manifest, by file name.

    `workers` threads read every shard to compare checksums, and `advance` is called after each.
    """
    damage = find_truncated(directory, manifest)

    def is_intact(entry: ShardEntry) -> bool:
        intact = entry.file not in damage and file_sha256(directory / entry.file) == entry.sha256
        advance()
        return intact

    with ThreadPoolExecutor(workers) as pool:
        intact = list(pool.map(is_intact, manifest.shards))
    for entry, good in zip(manifest.shards, intact, strict=True):
        if not good:
            damage.setdefault(entry.file, "checksum differs")
    return damage


def describe_damage(damage: dict[str, str]) -> str:
    """List the first damaged shards with their damage, and the number of the others."""
    return list_some([f"{file} ({what})" for file, what in sorted(damage.items())])


def file_sha256(path: Path) -> str:
    """Return the hex digest of a file; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
