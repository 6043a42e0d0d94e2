"""Write docs/configuration.md from the table of config keys."""

from pathlib import Path

from cxrjax.config_keys import KEYS, Group

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

Every run has one config. A recipe in `configs/` is a Python file with `get_config(arg)`, which starts from the defaults
below and changes some. On the command line, `--config NAME:ARG` picks a recipe, and `--config.KEY=VALUE` or
`--config.KEY VALUE` overrides one key. `cxrjax config NAME` prints the result, with `*` before each key that differs
from its default.

- A tuple is written as `--config.data.views=PA,AP` or in Python's syntax.
- A *group* is a nested config whose entries you choose. Set single entries, such as
  `--config.train.stages.head.optimizer.learning_rate=1e-3`, or the whole group as a Python dict; `{}` empties it.
- Unknown keys, wrong types, `None` and NaN are errors.

Examples of groups:

```python
head_first = {"train": {"freeze": ("backbone",)}}
fine_tune = {"optimizer": {"learning_rate": 1e-5}}
config.train.stages = {"stage1_head": head_first, "stage2_all": fine_tune}
config.data.mixture = {"mimic_cxr_jpg": {"weight": 0.3, "split": {"name": "official"}}}
config.labels.per_finding = {"Edema": {"uncertain": "ones", "not_mentioned": "unknown"}}
config.optimizer.lr_multipliers = {"backbone": 0.1}
config.model.init_members = {"dense": "weights/densenet121", "efficient": "weights/efficientnet_b3"}
```

This page is made from `cxrjax/config_keys.py` by `scripts/write_config_docs.py`.
"""


def page() -> str:
    """Return the page, one table per group of keys."""
    lines, section = [INTRODUCTION], None
    for name, key in KEYS.items():
        group = name.partition(".")[0] if "." in name else ""
        if group != section:
            section = group
            lines += [f"\n## {group or 'general'}\n", "| key | type or choices | default | meaning |"]
            lines.append("|---|---|---|---|")
        if isinstance(key, Group):
            lines.append(f"| `{name}` | group | `{{}}` | {key.meaning} |")
        else:
            kind = ", ".join(choice or "empty" for choice in key.choices) or key.type_name
            lines.append(f"| `{name}` | {kind} | `{key.default!r}` | {key.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
