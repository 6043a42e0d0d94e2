"""FHRNet: a global and a local HRNet and their fusion on ChestX-ray14, trained in three stages.

Paper     Huang et al., Fusion high-resolution network for diagnosing ChestX-ray images, Electronics 2020, 9, 190
Command   cxrjax prepare chestxray14 --source NIH --data-dir data --size 1024
          cxrjax study fhrnet --workdir runs/fhrnet
Argument  none: the paper's; "phantom": a small network on the phantom
Hardware  paper: 4 TITAN V; here one GPU (unmeasured)
Time      unmeasured
Memory    unmeasured
Score     paper: mean AUC .812 (fusion); ours unmeasured

Readings  The split is NIH's official one with a validation part drawn from its training patients; the paper's counts in
          section 3 are those of the lists of arnoweng/CheXNet: split.name=files and split.files with the three lists.
          Whole images are resized to 256 and cut to 224 at the centre; the region comes from the 1024 px image.
          Other readings: model.options.{neck,resize,crop,region,threshold,fusion,heads,dropout}, train.heads, and
          train.stages=() with model.options.stage=joint for joint training.
"""

from configs import on_phantom
from cxrjax.config import default

STAGES = (
    "model.options.stage=global; train.freeze=local_branch, classifier",
    "model.options.stage=local; train.freeze=global_branch, classifier",
    "model.options.stage=fusion; train.freeze=global_branch, local_branch",
)


def get_config(arg: str = ""):
    """The recipe, or its phantom."""
    config = default()
    config.title = "FHRNet"
    config.data.dataset = "chestxray14"
    config.data.stored = "1024"
    config.data.size = 1024
    config.split.name = "official"

    config.model.name = "fhrnet"
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    config.model.options.backbone = "hrnet_w32"
    config.model.options.neck = "half"
    config.optimizer.rate = 1e-4
    config.train.batch = 32
    config.train.epochs = 50
    config.train.stages = STAGES
    config.train.watch = "val_auroc"
    config.study.arms = ("global", "local", "fusion")
    if arg == "phantom":
        on_phantom(config)
        config.model.name = "fhrnet_small"
        del config.model.options.backbone, config.model.options.neck
        config.optimizer.rate = 1e-3
    elif arg:
        raise ValueError(f"the argument of fhrnet is nothing or phantom, not {arg}")
    return config
