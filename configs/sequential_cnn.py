"""Six exclusive classes with a small sequential CNN, in three versions.

Paper     Covid-19 and five classes of ChestX-ray14 images, a sequential CNN
Command   cxrjax prepare six_class --source FOLDERS --data-dir data --size 64
          cxrjax study sequential_cnn --workdir runs/sequential_cnn
Argument  the arm: version3 (default, the final one), version1 or version2; "phantom-ARM" is a short run
Hardware  a CPU is enough
Time      unmeasured
Memory    unmeasured
Score     paper: accuracy .8095, macro balanced accuracy .891 (version 3); ours unmeasured

Readings  64 px, which fits the printed model summary; for the text's 224 px set data.image_size=224 and
          model.options.image_size=224. Dropout 0.25 (not stated). Version 2 is one reading of its parameter count. No
          augmentation (not stated); a mild one is augment.flip=0.5 and augment.rotation=10.
          Class and source coincide in this data (Covid-19 from one collection, all else from another): the study
          reports how well the source alone can be predicted.
"""

from cxrjax.config import default, use_phantom

ARMS = {"version3": "sequential_cnn", "version1": "sequential_cnn_v1", "version2": "sequential_cnn_v2"}


def get_config(arg: str = ""):
    """Return the recipe of one version."""
    phantom, arm = arg.startswith("phantom"), arg.removeprefix("phantom").removeprefix("-") or "version3"
    if arm not in ARMS:
        raise ValueError(f"the arms of sequential_cnn are {', '.join(ARMS)}, not {arm}")
    config = default()
    config.title = "Sequential CNN, six classes"
    config.data.dataset = "six_class"
    config.data.stored_size = "64"
    config.data.image_size = 64
    config.split.name = "official"
    config.model.name = ARMS[arm]
    config.loss.name = "cross_entropy"
    config.optimizer.learning_rate = 1e-3
    if arm == "version2":
        config.optimizer.name = "sgd"
        config.optimizer.learning_rate = 1e-2
    config.train.batch_size = 32
    config.train.epochs = 70
    config.train.monitor = "val_accuracy"
    config.study.arms = tuple(ARMS)
    if phantom:
        dataset = config.data.dataset
        use_phantom(config)
        config.data.dataset = dataset  # six folders of drawn images: scripts/phantom_folders.py
        config.train.epochs = 20
        config.study.arms = ("phantom-version3", "phantom-version1")
    return config
