"""The effect of resolution: DenseNet121 at 256, 512, 1024 and 2048 px on MIMIC-CXR-JPG, five folds, stacked ensemble.

Paper     What is the effect of image resolution on chest X-ray classification, with effective receptive fields
Command   cxrjax prepare mimic_cxr_jpg --source MIMIC --data-dir data --size 2048   (credentialed data, PhysioNet)
          cxrjax weights convert densenet121.pth --arch densenet121 --out weights/densenet121
          cxrjax study resolution --config resolution --workdir runs/resolution
          One size and fold as a job of its own: cxrjax train --config resolution:1024 --workdir RUN
          --config.split.fold=3
Argument  the side of the images in px: 256, 512, 1024 (default) or 2048; 32, 64 and 128, or "phantom", are the phantom
Hardware  paper: six A100 of 40 GB; here unmeasured
Time      unmeasured
Memory    paper: 11.23, 22.29, 38.89, 39.13 GB a GPU; ours unmeasured
Score     paper: see tables 1 to 3; ours unmeasured

Readings  Rates and effective batches are the paper's table; the linear scaling of the rate would give 2048 px 4.1e-5.
          Labels of CheXpert, uncertain ones are negative (data.uncertain = ones | ignore | smooth are other policies);
          all views (data.views=("PA", "AP") takes the frontal ones).
"""

from configs import on_phantom
from cxrjax.config import default

# size: rate, effective batch
TABLE = {256: (5e-4, 512), 512: (2.5e-4, 256), 1024: (1.6e-4, 168), 2048: (8.204e-5, 42)}
PHANTOM = (32, 64, 128)


def get_config(arg: str = ""):
    """The recipe at one size."""
    size = PHANTOM[-1] if arg == "phantom" else int(arg or 1024)
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
    if size in PHANTOM:
        on_phantom(config, size=PHANTOM[-1])
        config.data.size = size
        config.model.name = "densenet_small"
        config.optimizer.rate = 5e-3
        config.study.sizes = PHANTOM
    else:
        config.optimizer.rate, config.train.batch = TABLE[size]
    return config
