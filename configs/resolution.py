"""The effect of resolution: DenseNet121 at 256, 512, 1024 and 2048 px on MIMIC-CXR-JPG, five folds, three ensembles.

Paper     What is the effect of image resolution on chest X-ray classification, with effective receptive fields
Command   for size in 256 512 1024 2048; do
            cxrjax prepare mimic_cxr_jpg --source MIMIC --data-dir data --size $size   (credentialed data, PhysioNet)
          done
          cxrjax weights convert densenet121.pth --arch densenet121 --out weights/densenet121
          cxrjax study resolution --workdir runs/resolution
          On a cluster each size and fold is a job of its own, then the same command without --only gathers them:
          cxrjax study resolution --workdir runs/resolution --only 1024px-fold3
Argument  words separated by commas: the side of the images in px, 256, 512, 1024 (default) or 2048, or 32, 64 or 128
          of the phantom; "phantom", which is all of the study on the phantom; "table" (default) or "linear" rates
Hardware  paper: six A100 of 40 GB; here unmeasured
Time      unmeasured; phantom: 201 s of CPU time a fold (41, 55 and 105 s by size), 30 s for the report, on busy cores
Memory    paper: 11.23, 22.29, 38.89, 39.13 GB a GPU; ours unmeasured
Score     paper: see tables 1 to 3; ours unmeasured. Phantom, mean test AUROC over five folds: .724, .778 and .860
          at 32, 64 and 128 px; stacked .920, voted .916, logistic .923

Readings  table: rates and effective batches as the paper prints them. linear: the same batches, and rates in proportion
          to them from 256 px on (5e-4 for 512 images), that is 2.5e-4, 1.641e-4 and 4.102e-5 at 512 to 2048 px. The
          8.204e-5 that the paper prints for 42 images is the linear value for 84.
          An effective batch is devices x images on each x parts added up: the printed one on any number of devices
          that divides it; train.per_device says how many images fit on a device at once.
          Labels of CheXpert, uncertain ones are negative (data.uncertain = ones | ignore | smooth are other policies);
          all views (data.views=("PA", "AP") takes the frontal ones).
"""

from configs import on_phantom
from cxrjax.config import default

# size: rate, effective batch
TABLE = {256: (5e-4, 512), 512: (2.5e-4, 256), 1024: (1.6e-4, 168), 2048: (8.204e-5, 42)}
PHANTOM = (32, 64, 128)
OPTIONS = ("phantom", "table", "linear")


def get_config(arg: str = ""):
    """The recipe at one size."""
    size, options = _read(arg)
    config = default()
    config.title = "The effect of image resolution"
    config.data.dataset = "mimic_cxr_jpg"
    config.data.stored = str(size)
    config.data.size = size
    config.split.name = "folds"
    config.split.fractions = (0.72, 0.08, 0.2)
    config.augment.flip = 0.5
    config.augment.rotation = 15.0

    config.model.name = "densenet121"
    config.model.init_from = "weights/densenet121"
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    config.optimizer.schedule = "plateau"
    config.optimizer.factor = 0.5
    config.optimizer.plateau = 3
    config.train.epochs = 100
    config.train.watch = "val_loss"
    config.train.patience = 10
    config.study.sizes = tuple(TABLE)
    config.study.folds = (0, 1, 2, 3, 4)
    config.study.paper = "resolution"
    if size in PHANTOM:
        return _phantom(config, size)
    config.optimizer.rate, config.train.batch = TABLE[size]
    if "linear" in options:
        rate, batch = TABLE[256]
        config.optimizer.rate = rate * config.train.batch / batch
    return config


def _read(arg: str) -> tuple[int, list[str]]:
    """The size and the options that an argument names."""
    words = [word for word in arg.split(",") if word]
    sizes, options = [int(word) for word in words if word.isdigit()], [word for word in words if not word.isdigit()]
    unknown = [word for word in options if word not in OPTIONS] + [n for n in sizes if n not in (*TABLE, *PHANTOM)]
    known = f"it takes a size, {', '.join(map(str, (*TABLE, *PHANTOM)))} px, and {', '.join(OPTIONS)}"
    if unknown or len(sizes) > 1 or {"table", "linear"} <= set(options):
        raise ValueError(f"resolution:{arg} is no argument of this recipe: {known}, of table and linear one")
    size = sizes[0] if sizes else PHANTOM[-1] if "phantom" in options else 1024
    if "phantom" in options and size not in PHANTOM:
        raise ValueError(
            f"resolution:{arg} is no argument of this recipe: the phantom has {', '.join(map(str, PHANTOM))}"
        )
    return size, options


def _phantom(config, size: int):
    """Small networks on drawn radiographs; all sizes have one batch, so that tabled and linear rates are the same."""
    on_phantom(config, size=PHANTOM[-1])
    config.split.name = "folds"
    config.data.size = size
    config.model.name = "densenet_small"
    config.optimizer.rate = 1e-2
    config.optimizer.schedule = "cosine"  # too few epochs for a plateau
    config.optimizer.warmup = 0.1
    config.optimizer.clip = 1.0
    config.train.steps_per_epoch = 150
    config.train.epochs = 9
    config.study.sizes = PHANTOM
    return config
