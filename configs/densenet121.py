"""DenseNet121 on ChestX-ray14, trained from scratch: a plain baseline.

Paper     Huang et al., Densely connected convolutional networks, CVPR 2017; data of Wang et al., CVPR 2017
Command   cxrjax prepare chestxray14 --source NIH --data-dir data --size 256
          cxrjax train --config densenet121:256 --workdir runs/densenet121
Argument  the side of the images in px: 224, 256 (default), 512 or 1024
Hardware  one GPU; also runs on a CPU, slowly
Time      unmeasured on a GPU
Memory    unmeasured on a GPU
Score     unmeasured
"""

from cxrjax.config import default, image_size


def get_config(arg: str = ""):
    """Return the recipe at one size."""
    config = default()
    config.title = "DenseNet121 on ChestX-ray14"
    size = image_size(arg or 256)
    config.data.dataset = "chestxray14"
    config.data.stored_size = str(size)
    config.data.image_size = size
    config.split.name = "official"
    config.augment.flip = 0.5
    config.augment.rotation = 15.0

    config.model.name = "densenet121"
    config.model.dtype = "bfloat16"
    config.model.remat = "layer"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "plateau"
    config.train.batch_size = 32
    config.train.epochs = 20
    config.train.early_stopping_patience = 10
    return config
