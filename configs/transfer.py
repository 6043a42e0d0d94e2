"""Transfer learning on 402 radiographs: frozen ImageNet networks, class-weighted loss, with and without augmentation.

Paper     DenseNet121 and ResNet50 on a small set of ChestX-ray14 images, with Grad-CAM
Command   cxrjax prepare chestxray14 --source NIH --data-dir data --size 512
          cxrjax weights convert densenet121.pth --arch densenet121 --out weights/densenet121   (and resnet50)
          cxrjax study transfer --workdir runs/transfer
Argument  the arm: densenet, densenet_augmented (default) or resnet_augmented; "phantom-ARM" uses the phantom
Hardware  one GPU; slow on a CPU
Time      unmeasured
Memory    unmeasured
Score     paper: test accuracy .82, .84, .76 of the arms in that order; ours unmeasured

Readings  Images are normalised as the ImageNet weights expect. The paper only scales to 0..1: convert the weights with
          --inputs unit and set model.input_spec=unit. Sigmoid and weighted binary cross-entropy;
          loss.options.weighting=literal swaps the printed weights. The size of the test split is not stated: 400.
          train.freeze=() fine-tunes everything.
"""

from cxrjax.config import default, use_phantom

ARMS = {
    "densenet": ("densenet121", False),
    "densenet_augmented": ("densenet121", True),
    "resnet_augmented": ("resnet50", True),
}
SMALL = {"densenet121": "densenet_small", "resnet50": "resnet_small"}


def get_config(arg: str = ""):
    """Return the recipe of one arm."""
    phantom, arm = arg.startswith("phantom"), arg.removeprefix("phantom").removeprefix("-")
    arm = arm or "densenet_augmented"
    if arm not in ARMS:
        raise ValueError(f"the arms of transfer are {', '.join(ARMS)}, not {arm}")
    network, augmented = ARMS[arm]
    config = default()
    config.title = "Transfer learning on a small set"
    config.data.dataset = "chestxray14"
    config.data.stored_size = "512"
    config.data.image_size = 400
    config.split.name = "small"
    config.split.sizes = (402, 40, 400)
    if augmented:
        config.augment.flip = 0.5
        config.augment.rotation = 10.0
        config.augment.shift = 0.1
        config.augment.zoom = 0.1
        config.augment.shear = 0.1

    config.model.name = network
    config.model.init_from = f"weights/{network}"
    config.loss.name = "weighted_bce"
    config.optimizer.learning_rate = 1e-3
    config.train.freeze = ("backbone",)
    config.train.batch_size = 16
    config.train.steps_per_epoch = 25
    config.train.epochs = 80
    config.train.monitor = "val_accuracy"
    config.train.early_stopping_patience = 10
    config.study.arms = tuple(ARMS)
    if phantom:
        use_phantom(config)
        config.model.name = SMALL[network]
        config.train.freeze = ()  # nothing is pretrained
        config.study.arms = tuple(f"phantom-{name}" for name in ARMS)
    return config
