"""The demo: a resolution study on the embedded phantom, in minutes on two CPU cores.

Paper     none; it shows on synthetic radiographs what the study of `resolution` asks of real ones
Command   cxrjax demo
Argument  the side of the images in px; without one, the study's list of sizes is what matters
Hardware  two CPU cores, 2 GB
Time      3.8 to 4.7 minutes in five runs, nothing cached (in one: training 23, 33 and 67 s, control 71 s)
Memory    1.2 GB resident at most
Score     mean test AUROC .770, .861 and .974 at 32, 64 and 128 px; stacked .993, voted .991 (seed 0)
"""

from configs import side
from cxrjax.config import default

SIZES = (32, 64, 128)


def get_config(arg: str = ""):
    """The recipe at one size."""
    config = default()
    config.title = "Which resolution does this finding need?"
    config.data.dataset = "cxr_phantom"
    config.data.stored = "128"
    config.data.size = side(arg or SIZES[-1])
    config.data.uncertain = "ignore"
    config.split.name = "official"
    config.augment.flip = 0.5

    config.model.name = "densenet_small"
    config.optimizer.name = "adamw"
    config.optimizer.rate = 1e-2
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 0.1
    config.optimizer.decay = 1e-4
    config.optimizer.clip = 1.0
    config.train.batch = 16
    config.train.epochs = 12
    config.evaluate.batch = 100
    config.mesh.data = 1

    config.study.sizes = SIZES
    config.study.fine = ("Nodule", "Pneumothorax", "Reticulation", "Support Devices")
    config.study.coarse = ("Cardiomegaly", "Pleural Effusion", "Mass")
    config.study.control = ("Cardiomegaly", "Pleural Effusion", "Mass")
    config.study.control_size = SIZES[-1]
    return config
