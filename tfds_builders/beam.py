"""Write shards on many machines with Apache Beam.

TFDS's own Beam support would shuffle the examples through the runner and write shards whose lengths depend on their
bytes. Here an element of the pipeline is a block of records: a worker writes the shards of its block itself, with
`build.write_shards`, and returns only the block's first row. So all workers must see the source and the data directory
under the same paths of a shared file system.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

from cxrjax.errors import CxrError
from cxrjax.files import write_text
from tfds_builders.build import WriteMissing, write_shards
from tfds_builders.shard_writer import DatasetWriter

if TYPE_CHECKING:
    from tfds_builders.builder import RadiographBuilder

BuilderFactory = Callable[[], "RadiographBuilder"]


def write_with_beam(factories: Sequence[BuilderFactory], flags: Sequence[str]) -> WriteMissing:
    """Return a function for `build.build_datasets` that writes the missing shards with Beam.

    Args:
      factories: make the builder of each size; called on every worker, which reads the source's tables.
      flags: Beam's pipeline options, such as `--runner=FlinkRunner`.
    """

    def write_missing(writers: Sequence[DatasetWriter]) -> None:
        length = max(writer.shard_length for writer in writers)
        starts = sorted({row // length * length for writer in writers for row in writer.missing_rows})
        for writer in writers:
            writer.errors_dir.mkdir(parents=True, exist_ok=True)
        with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
            blocks = pipeline | "blocks" >> beam.Create(starts) | "spread" >> beam.Reshuffle()
            _ = blocks | "write" >> beam.ParDo(_WriteBlock(factories))
        for writer in writers:
            writer.load_finished()
            for error in sorted(writer.errors_dir.iterdir()):
                raise CxrError(error.read_text(encoding="utf-8"))
            if writer.missing:
                raise CxrError(
                    f"the Beam pipeline ended, but {len(writer.missing):,} shards are not in {writer.directory}: are "
                    "--source and --data-dir the same folders on every worker?"
                )

    return write_missing


class _WriteBlock(beam.DoFn):
    """Writes the shards of one block of records."""

    def __init__(self, factories: Sequence[BuilderFactory]):
        self.factories = factories

    def setup(self) -> None:
        """Read the source's tables, once per worker."""
        self.builders = [factory() for factory in self.factories]
        self.records = self.builders[0].records()
        for builder in self.builders[1:]:
            builder.copy_source_from(self.builders[0])

    def process(self, start: int) -> Iterator[int]:
        """Write the missing shards of the block that starts at this row; a `CxrError` is saved to a file."""
        writers = [DatasetWriter(builder, self.records) for builder in self.builders]
        rows = range(start, min(start + max(writer.shard_length for writer in writers), len(self.records)))
        for writer in writers:
            writer.load_finished(rows)
        try:
            write_shards(writers, rows, workers=self.builders[0].workers, advance=lambda: None)
        except CxrError as error:  # if raised, Beam would retry it and wrap it in a traceback
            write_text(writers[0].errors_dir / f"{start:09d}.txt", str(error))
        yield start
