"""Six exclusive classes with a small sequential CNN, in three versions.

Paper     Covid-19 and five classes of ChestX-ray14 images, a sequential CNN
Command   cxrjax prepare six_class --source FOLDERS --data-dir data --size 64
          cxrjax study sequential_cnn --workdir runs/sequential_cnn
Argument  the arm: version3 (default, the final one), version1 or version2; with "phantom-" before it, a short run
Hardware  a CPU is enough
Time      unmeasured
Memory    unmeasured
Score     paper: accuracy .8095, macro balanced accuracy .891 (version 3); ours unmeasured

Readings  64 px, which fits the printed model summary; the text's 224: data.size=224 with model.options.image_size=224.
          Dropout 0.25 (unstated). Version 2 is one reading of its parameter count. No augmentation (unstated); a mild
          one is augment.flip=0.5 and augment.rotation=10.
          Source and class go together in this data (Covid-19 from one collection, all else from another): the study
          reports how well the source alone can be told.
"""

from configs import on_phantom
from cxrjax.config import default

ARMS = {"version3": "sequential_cnn", "version1": "sequential_cnn_v1", "version2": "sequential_cnn_v2"}


def get_config(arg: str = ""):
    """The recipe of one version."""
    phantom, arm = arg.startswith("phantom"), arg.removeprefix("phantom").removeprefix("-") or "version3"
    if arm not in ARMS:
        raise ValueError(f"the arms of sequential_cnn are {', '.join(ARMS)}, not {arm}")
    config = default()
    config.title = "Sequential CNN, six classes"
    config.data.dataset = "six_class"
    config.data.stored = "64"
    config.data.size = 64
    config.split.name = "official"
    config.model.name = ARMS[arm]
    config.loss.name = "cross_entropy"
    config.optimizer.rate = 1e-3
    if arm == "version2":
        config.optimizer.name = "sgd"
        config.optimizer.rate = 1e-2
    config.train.batch = 32
    config.train.epochs = 70
    config.train.watch = "val_accuracy"
    config.study.arms = tuple(ARMS)
    if phantom:
        dataset = config.data.dataset
        on_phantom(config)
        config.data.dataset = dataset  # six folders of drawn images: scripts/phantom_folders.py
        config.train.epochs = 20
        config.study.arms = ("phantom-version3", "phantom-version1")
    return config
