"""DenseNet121 and EfficientNetB3 fused by attention, with three baselines, focal loss and Monte Carlo dropout.

Paper     Dense-Efficient attention fusion with uncertainty on half of ChestX-ray14's patients
Command   cxrjax prepare chestxray14 --source NIH --data-dir data --size 224
          cxrjax weights convert FILE --arch NAME --out weights/NAME   (densenet121, efficientnet_b0, efficientnet_b3)
          cxrjax study attention_fusion --workdir runs/attention_fusion
Argument  the arm: simple_cnn, densenet121, efficientnet_b0 or fusion (default); "phantom-ARM" uses the phantom
Hardware  one GPU (unmeasured)
Time      unmeasured
Memory    unmeasured
Score     paper: macro AUC .6558, .7096, .7363, .8156 in that order; ours unmeasured

Readings  Patients, not images, are stratified. "10 %" of rotation is read as 10 degrees; augment.rotation=36 is
          Keras' reading. The coarser maps are enlarged. The attention is gated self-attention, which fits the printed
          parameter count; model.options.attention=cross and match=down are the other readings, and
          loss.options.weighting=balanced the other alpha. Early stopping after 5 epochs (not stated). The dropout of
          the baselines is 0.5 in the table and 0.4 in the text; 0.4 is the default here.
"""

from cxrjax.config import default, use_phantom

ARMS = ("simple_cnn", "densenet121", "efficientnet_b0", "fusion")
SMALL = {
    "simple_cnn": "simple_cnn", "densenet121": "densenet_small", "efficientnet_b0": "efficientnet_small",
    "fusion": "attention_fusion_small",
}  # fmt: skip


def get_config(arg: str = ""):
    """Return the recipe of one arm."""
    phantom, arm = arg.startswith("phantom"), arg.removeprefix("phantom").removeprefix("-") or ARMS[-1]
    if arm not in ARMS:
        raise ValueError(f"the arms of attention_fusion are {', '.join(ARMS)}, not {arm}")
    config = default()
    config.title = "Attention fusion"
    config.data.dataset = "chestxray14"
    config.data.stored_size = "224"
    config.data.image_size = 224
    config.split.name = "stratified"
    config.split.subset_fraction = 0.5
    config.split.fractions = (0.7, 0.1, 0.2)
    config.augment.flip = 0.5
    config.augment.rotation = 10.0
    config.augment.zoom = 0.1
    config.augment.brightness = 0.1

    config.loss.name = "focal"
    config.train.batch_size = 32
    config.train.epochs = 25
    config.train.early_stopping_patience = 5
    config.optimizer.learning_rate = 1e-3
    config.model.dtype = "bfloat16"
    config.study.arms = ARMS
    head_first = {"train": {"freeze": ("backbone",)}, "optimizer": {"learning_rate": 1e-3}}
    fusion_first = {
        "train": {"freeze": ("dense", "efficient"), "batch_norm": "frozen"},
        "optimizer": {"learning_rate": 1e-3},
    }
    fine_tune = {"optimizer": {"learning_rate": 1e-3 if phantom else 1e-5}}
    if arm == "fusion":
        config.model.name = "attention_fusion"
        config.model.init_members = {"dense": "weights/densenet121", "efficient": "weights/efficientnet_b3"}
        config.train.stages = {"stage1_fusion": fusion_first, "stage2_all": fine_tune}
    elif arm == "simple_cnn":
        config.model.name = arm
    else:
        config.model.name = arm
        config.model.init_from = f"weights/{arm}"
        config.model.options.hidden = 512
        config.model.options.dropout = 0.4
        config.train.stages = {"stage1_head": head_first, "stage2_all": fine_tune}
    if phantom:
        use_phantom(config)
        config.model.name = SMALL[arm]
        if "hidden" in config.model.options:
            config.model.options.hidden = 32
        config.study.arms = tuple(f"phantom-{name}" for name in ARMS)
    return config
