"""From the names that a file gives its arrays to the published names of a network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cxrjax.errors import CxrError
from cxrjax.models.backbone import Backbone
from cxrjax.models.pretrained import published_module, published_name

# torchvision before 0.3: denselayer1.norm.1.weight for denselayer1.norm1.weight
_LEGACY_LAYER = re.compile(r"(?P<layer>denselayer\d+\.(?:norm|conv))\.(?P<number>[12])\.(?=\w+$)")
_XRV_THRESHOLDS = "op_threshs"


@dataclass(frozen=True)
class Named:
    """Arrays by published names.

    Attributes:
      arrays: by published name.
      original: what the file calls each.
      dropped: the file's names of arrays that no network has, and why.
      notes: how names were changed.
      torchxrayvision: whether an array of torchxrayvision's was among them.
    """

    arrays: dict[str, np.ndarray]
    original: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    torchxrayvision: bool


def published(arrays: Mapping[str, np.ndarray], family: type[Backbone]) -> Named:
    """Give arrays the names that the family's reference gives them.

    Known are: prefixes that all names have (`module.` of DataParallel, `model.`, CheXNet's `module.densenet121.`),
    torchvision's older names of dense layers (`norm.1`), a head inside a sequence (`classifier.0`), and
    torchxrayvision's operating thresholds.

    Raises:
      CxrError: two names become one.
    """
    names = {name: name for name in arrays}  # what each is now: what the file calls it
    notes = []

    def rename(change, note: str) -> None:
        nonlocal names
        new = {}
        for name, original in names.items():
            if (changed := change(name)) in new:
                raise CxrError(f"{original} and {new[changed]} are both {changed}: remove one")
            new[changed] = original
        if new != names:
            notes.append(note)
        names = new

    thresholds = [name for name in names if name.rpartition(".")[2] == _XRV_THRESHOLDS]
    dropped = {
        names.pop(name): "torchxrayvision's operating thresholds are no part of the network" for name in thresholds
    }
    while prefix := _common_prefix(names, top_modules(family)):
        rename(lambda name, prefix=prefix: name.removeprefix(prefix), f"all names began with {prefix}")
    rename(lambda name: _LEGACY_LAYER.sub(r"\g<layer>\g<number>.", name), "older names such as norm.1 stand for norm1")
    head = published_name(family, ("classifier", "output", "kernel")).removesuffix(".weight")
    root = published_module(family, "classifier")
    inside = {match[1] for name in names if (match := re.match(rf"{re.escape(root)}(\.\d+|)\.(?:weight|bias)$", name))}
    if len(inside) == 1 and (found := root + inside.pop()) != head:
        rename(lambda name: re.sub(rf"^{re.escape(found)}\.(?=\w+$)", f"{head}.", name), f"the head was called {found}")
    kept = {name: arrays[original] for name, original in names.items()}
    return Named(kept, names, dropped, tuple(notes), bool(thresholds))


def top_modules(family: type[Backbone]) -> set[str]:
    """Published names of the family's top-level modules, as far as the family alone tells them."""
    ours = [path for path in (*getattr(family, "stem", ()), *family.replaceable) if path]
    theirs = [path for _, path in family.published if path] + [published_module(family, path) for path in ours]
    return {path.partition(".")[0] for path in theirs}


def _common_prefix(names: Mapping[str, str], known: set[str]) -> str:
    """The first part of all names, with its dot, if they have one in common that the network does not."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return f"{first}." if first and first not in known else ""
