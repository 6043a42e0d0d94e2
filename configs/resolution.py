"""The effect of resolution: DenseNet121 at 256, 512, 1024 and 2048 px on MIMIC-CXR-JPG, five folds, three ensembles.

Paper     What is the effect of image resolution on chest X-ray classification, with effective receptive fields
Command   for size in 256 512 1024 2048; do
            cxrjax prepare mimic_cxr_jpg --source MIMIC --data-dir data --size $size   (credentialed data, PhysioNet)
          done
          cxrjax weights convert densenet121.pth --arch densenet121 --out weights/densenet121
          cxrjax study resolution --workdir runs/resolution
          On a cluster, run each size and fold as a separate job, then the command without --only to collect them:
          cxrjax study resolution --workdir runs/resolution --only 1024px-fold3
Argument  separated by commas: the image size in px (256, 512, 1024 (default) or 2048; 32, 64 or 128 on the phantom);
          "phantom" for the study on the phantom; "table" (default) or "linear" for the learning rates
Hardware  paper: six A100 of 40 GB; here unmeasured
Time      unmeasured; phantom: 201 s of CPU time a fold (41, 55 and 105 s by size), 30 s for the report, on busy cores
Memory    paper: 11.23, 22.29, 38.89, 39.13 GB a GPU; ours unmeasured
Score     paper: see tables 1 to 3; ours unmeasured. Phantom, mean test AUROC over five folds: .724, .778 and .860
          at 32, 64 and 128 px; stacked .920, voted .916, logistic .923

Readings  table: learning rates and effective batches as printed. linear: the same batches, with learning rates
          proportional to them, starting from 5e-4 for 512 images at 256 px: 2.5e-4, 1.641e-4 and 4.102e-5 at 512 to
          2048 px. The 8.204e-5 that the paper prints for 42 images is the linear value for 84.
          The effective batch is devices x images per device x accumulation steps. It works on any number of devices
          that divides it; train.per_device_batch_size says how many images fit on a device at once.
          CheXpert labels, uncertain ones as negative (labels.uncertain=ones, ignore or smooth are other policies);
          all views (data.views=PA,AP keeps the frontal ones).
"""

from cxrjax.config import default, use_phantom

# size: learning rate, effective batch
TABLE = {256: (5e-4, 512), 512: (2.5e-4, 256), 1024: (1.6e-4, 168), 2048: (8.204e-5, 42)}
PHANTOM = (32, 64, 128)
OPTIONS = ("phantom", "table", "linear")


def get_config(arg: str = ""):
    """Return the recipe at one size."""
    size, options = _parse(arg)
    config = default()
    config.title = "The effect of image resolution"
    config.data.dataset = "mimic_cxr_jpg"
    config.data.stored_size = str(size)
    config.data.image_size = size
    config.split.name = "folds"
    config.split.fractions = (0.72, 0.08, 0.2)
    config.augment.flip = 0.5
    config.augment.rotation = 15.0

    config.model.name = "densenet121"
    config.model.init_from = "weights/densenet121"
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    config.optimizer.schedule = "plateau"
    config.optimizer.plateau_factor = 0.5
    config.optimizer.plateau_patience = 3
    config.train.epochs = 100
    config.train.monitor = "val_loss"
    config.train.early_stopping_patience = 10
    config.study.sizes = tuple(TABLE)
    config.study.folds = (0, 1, 2, 3, 4)
    config.study.paper = "resolution"
    if size in PHANTOM:
        return _phantom(config, size)
    config.optimizer.learning_rate, config.train.batch_size = TABLE[size]
    if "linear" in options:
        rate, batch = TABLE[256]
        config.optimizer.learning_rate = rate * config.train.batch_size / batch
    return config


def _parse(arg: str) -> tuple[int, list[str]]:
    """The size and the options in an argument."""
    items = [item for item in arg.split(",") if item]
    sizes, options = [int(item) for item in items if item.isdigit()], [item for item in items if not item.isdigit()]
    unknown = [item for item in options if item not in OPTIONS] + [n for n in sizes if n not in (*TABLE, *PHANTOM)]
    if unknown or len(sizes) > 1 or {"table", "linear"} <= set(options):
        names = ", ".join(map(str, (*TABLE, *PHANTOM)))
        raise ValueError(
            f"invalid argument resolution:{arg}: give one size ({names} px) and any of {', '.join(OPTIONS)}, "
            "but not both table and linear"
        )
    size = sizes[0] if sizes else PHANTOM[-1] if "phantom" in options else 1024
    if "phantom" in options and size not in PHANTOM:
        raise ValueError(
            f"invalid argument resolution:{arg}: the sizes of the phantom are {', '.join(map(str, PHANTOM))}"
        )
    return size, options


def _phantom(config, size: int):
    """Small networks on the phantom. All sizes have the same batch, so table and linear rates are the same."""
    use_phantom(config, size=PHANTOM[-1])
    config.split.name = "folds"
    config.data.image_size = size
    config.model.name = "densenet_small"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "cosine"  # too few epochs for a plateau
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.grad_clip_norm = 1.0
    config.train.steps_per_epoch = 150
    config.train.epochs = 9
    config.study.sizes = PHANTOM
    return config
