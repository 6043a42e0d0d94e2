"""What devices send each other in a compiled program, read from its text (optimised HLO)."""

import math
import re
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

_BITS = {"pred": 8, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32,
         "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}  # fmt: skip
_CALL = re.compile(rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([0-9,]*)\}|\[(\d+),(\d+)\]|mesh\[(.*?)\] \{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
      kind: one of `KINDS`.
      shapes: of what it gives, such as `f32[2,64]`.
      bytes: of that.
      group: how many devices take part in it; 0 where the text does not say (collective-permute).
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that leave one device: those of the ring algorithms."""
        share = (self.group - 1) / self.group if self.group else 1.0
        return self.bytes * {"all-reduce": 2 * share, "reduce-scatter": self.group - 1.0}.get(
            self.kind, 1.0 if self.kind == "collective-permute" else share
        )


def collectives(text: str) -> list[Collective]:
    """The calls in a compiled program (`compiled.as_text()`), those in loops once."""
    found = []
    for line in text.splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        shapes = _SHAPE.findall(call["type"])
        if call["start"] and call["kind"] != "all-reduce":  # (operands, results, ...)
            shapes = [shape for shape in shapes if shape[1]]
            shapes = shapes[len(shapes) // 2 :]
        found.append(
            Collective(
                kind=call["kind"],
                shapes=tuple(f"{kind}[{extent}]" for kind, extent in shapes),
                bytes=sum(_bytes(kind, extent) for kind, extent in shapes),
                group=_group(line),
            )
        )
    return found


def bytes_of(kind: str) -> int:
    """Bytes of a type as XLA writes it, such as `f32[2,64]{1,0}` or a tuple of such."""
    return sum(_bytes(name, extent) for name, extent in _SHAPE.findall(kind))


def _bytes(kind: str, extent: str) -> int:
    count = 1
    for side in extent.split(","):
        count *= int(side or 1)
    return count * _BITS.get(kind, 32) // 8


def _group(line: str) -> int:
    groups = _GROUPS.search(line)
    if groups is None:
        return 0
    listed, _, size, axes, named = groups.groups()
    if listed is not None:
        return len(listed.split(","))
    if size is not None:
        return int(size)
    return math.prod(int(extent) for axis, extent in _AXIS.findall(axes) if f"'{axis}'" in named)
