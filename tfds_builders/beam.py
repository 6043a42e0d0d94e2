"""Making the shards on many machines with Apache Beam: the same work as in one process, given out in blocks of shards.

TFDS's own Beam support would make the examples on the workers, shuffle them through the runner and write shards of
lengths that depend on their bytes. Here an element of the pipeline is a range of records, a worker writes the shards of
that range itself, as `shards.write` does anywhere, and only its number travels. So source and data directory must be on
a file system that every worker sees under the same path.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import apache_beam as beam  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

from cxrjax.errors import CxrError
from cxrjax.files import write_text
from tfds_builders.shard_writer import Draft
from tfds_builders.shards import write

if TYPE_CHECKING:
    from tfds_builders.builder import Radiographs

Recipe = Callable[[], "Radiographs"]


def run(recipes: Sequence[Recipe], flags: Sequence[str]) -> Callable[[Sequence[Draft]], None]:
    """How `shards.make` is to make what is missing.

    Args:
      recipes: one builder per draft; they are made again on every worker, and read the source's tables there.
      flags: Beam's pipeline options, such as `--runner=FlinkRunner`.
    """

    def make(drafts: Sequence[Draft]) -> None:
        length = max(draft.length for draft in drafts)
        starts = sorted({row // length * length for draft in drafts for row in draft.rows})
        for draft in drafts:
            draft.failures.mkdir(parents=True, exist_ok=True)
        with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
            blocks = pipeline | "blocks" >> beam.Create(starts) | "spread" >> beam.Reshuffle()
            _ = blocks | "write" >> beam.ParDo(_Write(recipes))
        for draft in drafts:
            draft.trust()
            for failure in sorted(draft.failures.iterdir()):
                raise CxrError(failure.read_text(encoding="utf-8"))
            if draft.missing:
                raise CxrError(
                    f"Beam's pipeline ended, but {len(draft.missing):,} shards are not in {draft.directory}: are "
                    "--source and --data-dir the same folders on every worker?"
                )

    return make


class _Write(beam.DoFn):
    """Writes the shards of one block of records."""

    def __init__(self, recipes: Sequence[Recipe]):
        self.recipes = recipes

    def setup(self) -> None:
        """Read the source's tables, once per worker."""
        self.builders = [recipe() for recipe in self.recipes]
        self.records = self.builders[0].records()
        for builder in self.builders[1:]:
            builder.adopt(self.builders[0])

    def process(self, start: int) -> Iterator[int]:
        """Write what is missing of the block that starts at this record; what a user can mend is noted, not raised."""
        drafts = [Draft(builder, self.records) for builder in self.builders]
        rows = range(start, min(start + max(draft.length for draft in drafts), len(self.records)))
        for draft in drafts:
            draft.trust(rows)
        try:
            write(drafts, rows, workers=self.builders[0].workers, advance=lambda: None)
        except CxrError as error:  # would be tried again in vain, and come back inside a traceback
            write_text(drafts[0].failures / f"{start:09d}.txt", str(error))
        yield start
