"""FHRNet: a global and a local HRNet and their fusion on ChestX-ray14, trained in three stages.

Paper     Huang et al., Fusion high-resolution network for diagnosing ChestX-ray images, Electronics 2020, 9, 190
Command   cxrjax prepare chestxray14 --source NIH --data-dir data --size 1024
          cxrjax study fhrnet --workdir runs/fhrnet
Argument  none: as in the paper; "official": NIH's own split; "phantom": a small network on the phantom
Hardware  paper: 4 TITAN V; here one GPU (unmeasured)
Time      unmeasured
Memory    unmeasured
Score     paper: mean AUC .812 (fusion); ours unmeasured

Readings  The split is that of the paper's section 3. Its counts match the lists of arnoweng/CheXNet on GitHub
          (ChestX-ray14/labels): put the three files into lists/, or set split.files. Section 2.1 has the counts of
          NIH's own test list, with a validation split drawn from its training patients: the argument "official".
          Whole images are resized to 256 and cropped to 224 at the centre; the region comes from the 1024 px image.
          Other readings: model.options.{neck,resize,crop,region,threshold,fusion,heads,dropout,prediction},
          loss.name=softmax (with fusion=weighted and heads=shared, equations 5 to 9), and for joint training
          train.stages={} with model.options.stage=joint; train.heads=alternating trains one head per step.
"""

from cxrjax.config import default, use_phantom

STAGES = {
    "stage1_global": {"model": {"options": {"stage": "global"}}, "train": {"freeze": ("local_branch", "classifier")}},
    "stage2_local": {"model": {"options": {"stage": "local"}}, "train": {"freeze": ("global_branch", "classifier")}},
    "stage3_fusion": {
        "model": {"options": {"stage": "fusion"}},
        "train": {"freeze": ("global_branch", "local_branch")},
    },
}


def get_config(arg: str = ""):
    """Return the recipe, or its phantom version."""
    config = default()
    config.title = "FHRNet"
    config.data.dataset = "chestxray14"
    config.data.stored_size = "1024"
    config.data.image_size = 1024
    config.split.name = "files"
    config.split.files = ("lists/train_list.txt", "lists/val_list.txt", "lists/test_list.txt")

    config.model.name = "fhrnet"
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    config.model.options.backbone = "hrnet_w32"
    config.model.options.neck = "half"
    config.optimizer.learning_rate = 1e-4
    config.train.batch_size = 32
    config.train.epochs = 50
    config.train.stages = STAGES
    config.train.monitor = "val_auroc"
    config.study.arms = ("global", "local", "fusion")
    if arg == "official":
        config.split.name, config.split.files = "official", ()
    elif arg == "phantom":
        use_phantom(config)
        config.split.files = ()
        config.model.name = "fhrnet_small"
        del config.model.options.backbone, config.model.options.neck
        config.optimizer.learning_rate = 1e-3
    elif arg:
        raise ValueError(f"the argument of fhrnet is nothing, official or phantom, not {arg}")
    return config
