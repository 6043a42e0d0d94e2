"""The demo: a resolution study on built-in synthetic data, in minutes on two CPU cores.

Paper     none; it asks of synthetic radiographs what the study `resolution` asks of real ones
Command   cxrjax demo
Argument  the image size in px; the study trains all of study.sizes
Hardware  two CPU cores, 2 GB
Time      3.8 to 4.7 minutes in five runs with empty caches (in one: training 23, 33 and 67 s, control 71 s)
Memory    at most 1.2 GB resident
Score     mean test AUROC .770, .861 and .974 at 32, 64 and 128 px; stacked .993, voted .991 (seed 0)
"""

from cxrjax.config import default, image_size

SIZES = (32, 64, 128)


def get_config(arg: str = ""):
    """Return the recipe at one size."""
    config = default()
    config.title = "Which resolution does this finding need?"
    config.data.dataset = "cxr_phantom"
    config.data.stored_size = "128"
    config.data.image_size = image_size(arg or SIZES[-1])
    config.labels.uncertain = "ignore"
    config.split.name = "official"
    config.augment.flip = 0.5

    config.model.name = "densenet_small"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.weight_decay = 1e-4
    config.optimizer.grad_clip_norm = 1.0
    config.train.batch_size = 16
    config.train.epochs = 12
    config.evaluate.batch_size = 100
    config.mesh.data = 1

    config.study.sizes = SIZES
    config.study.fine = ("Nodule", "Pneumothorax", "Reticulation", "Support Devices")
    config.study.coarse = ("Cardiomegaly", "Pleural Effusion", "Mass")
    config.study.control = ("Cardiomegaly", "Pleural Effusion", "Mass")
    config.study.control_size = SIZES[-1]
    return config
