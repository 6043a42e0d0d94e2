"""The sequential CNNs against SciPy and their published parameter counts; the simple CNN."""

import dataclasses
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import relative_error
from scipy.signal import correlate

from cxrjax.errors import CxrError
from cxrjax.explain.receptive_field import receptive_fields
from cxrjax.explain.saliency import saliency
from cxrjax.models import create
from cxrjax.models.network import Network, parameter_count

NAMES = ("sequential_cnn", "sequential_cnn_v1", "sequential_cnn_v2")


def grey(count: int, size: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).integers(0, 256, (count, size, size, 1), np.uint8))


def test_parameter_counts_are_as_published():
    published = dict(zip(NAMES, (167_750, 167_750, 16_851_398), strict=True))
    assert {name: parameter_count(create(name, classes=6)) for name in NAMES} == published


def test_version_3_matches_the_papers_summary():
    network = Network.from_model(create("sequential_cnn", classes=6))
    paths = [("stage1",), ("stage2",), ("stage3",), ("dense",), ("classifier",)]
    assert [parameter_count(network.params[path]) for (path,) in paths] == [896, 9248, 9248, 147_584, 774]
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    shapes = {"stage1": (2, 31, 31, 32), "stage2": (2, 14, 14, 32), "final": (2, 6, 6, 32)}
    assert {name: maps.shape for name, maps in features.items()} == shapes


def get_path(tree: Any, path: Sequence[str | int]) -> Any:
    return reduce(getitem, path, tree)


def scipy_forward(name: str, network: Network, images: np.ndarray, train: bool) -> tuple[np.ndarray, dict]:
    """Logits of prepared images, and batch means and unbiased variances by module; float64."""
    params, stats = jax.device_get((network.params, network.stats))
    statistics = {}

    def norm(values: np.ndarray, params: dict, *path: str | int) -> np.ndarray:
        if "norm" not in params:
            return values
        rows, running = values.reshape(-1, values.shape[-1]), get_path(stats, path)
        statistics[path] = {"mean": rows.mean(0), "var": rows.var(0, ddof=1)}
        mean, var = (rows.mean(0), rows.var(0)) if train else (running["norm"]["mean"], running["norm"]["var"])
        return (values - mean) / np.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]

    pad = 1 if name.endswith("v2") else 0
    maps = images
    for stage in ("stage1", "stage2", "stage3"):
        kernel, bias = params[stage]["conv"]["kernel"], params[stage]["conv"]["bias"]
        padded = np.pad(maps, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        per_output = [
            [correlate(image, kernel[..., o], mode="valid")[..., 0] + bias[o] for o in range(kernel.shape[-1])]
            for image in padded
        ]
        maps = norm(np.maximum(np.array(per_output).transpose(0, 2, 3, 1), 0), params[stage], stage)
        if not pad:
            side = maps.shape[1] // 2
            corners = [maps[:, row : 2 * side : 2, column : 2 * side : 2] for row in (0, 1) for column in (0, 1)]
            maps = np.max(corners, axis=0)
    vector = maps.reshape(len(maps), -1)
    for number, layer in params["dense"].items():
        vector = np.maximum(vector @ layer["linear"]["kernel"] + layer["linear"]["bias"], 0)
        vector = norm(vector, layer, "dense", number)
    return vector @ params["classifier"]["output"]["kernel"] + params["classifier"]["output"]["bias"], statistics


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_scipys(name, train):
    size = 9 if name.endswith("v2") else 31
    rng = np.random.default_rng(0)
    images = rng.random((4, size, size, 3))
    with jax.enable_x64(True):
        options = {"image_size": size, "dropout": 0.0}
        network = Network.from_model(create(name, classes=6, dtype="float64", seed=3, **options))
        random = lambda leaf: jnp.asarray(leaf + rng.uniform(0, 0.3, leaf.shape))  # noqa: E731
        network = dataclasses.replace(
            network, params=jax.tree.map(random, network.params), stats=jax.tree.map(random, network.stats)
        )

        @jax.jit
        def run(network, images):
            model = network.model()
            return model(images, train=train), Network.from_model(model).stats

        logits, stats = jax.device_get(run(network, images))
    expected, statistics = scipy_forward(name, network, images, train)
    np.testing.assert_allclose(logits, expected, rtol=1e-11)
    assert len(statistics) == (5 if name.endswith("v2") else 0)
    before = jax.device_get(network.stats)
    for path, batch in statistics.items():
        for leaf, value in get_path(before, path)["norm"].items():
            updated = 0.9 * value + 0.1 * batch[leaf] if train else value
            np.testing.assert_allclose(get_path(stats, path)["norm"][leaf], updated, rtol=1e-11)


def test_a_key_activates_dropout_in_every_stage():
    model = create("sequential_cnn", classes=6, seed=1)
    images = jnp.asarray(np.random.default_rng(0).random((2, 64, 64, 3)), jnp.float32)
    plain = model.features(images)
    drawn, again, other = (model.features(images, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(drawn["stage1"], plain["stage1"])  # before its own dropout
    for name in ("stage2", "final"):
        np.testing.assert_array_equal(drawn[name], again[name])
        assert not np.array_equal(drawn[name], other[name])
        assert not np.array_equal(drawn[name], plain[name])
    # Monte Carlo dropout: draws of the head alone, about the prediction.
    draws = jax.vmap(lambda key: model.head(plain, key=key))(jax.random.split(jax.random.key(2), 500))
    prediction = model(images)
    assert draws.std(0).min() > 0.01
    assert relative_error(draws.mean(0), prediction) < 0.2


def test_the_heads_dropout_rate():
    model: Any = create("sequential_cnn", classes=6, dropout=0.4)
    model.dense[0].linear.kernel[...] = jnp.zeros((1152, 128)).at[:, 0].set(1.0)
    model.classifier.output.kernel[...] = jnp.zeros((128, 6)).at[0].set(1.0)
    ones = {"final": jnp.ones((200, 6, 6, 32))}
    kept = model.head(ones, key=jax.random.key(0))[:, 0] * 0.6 / 1152  # each kept value counts 1 / 0.6
    assert abs(kept.mean() - 0.6) < 0.005
    assert abs(kept.std() - np.sqrt(0.6 * 0.4 / 1152)) < 0.003


def test_version_1_has_no_dropout():
    network = Network.from_model(create("sequential_cnn_v1", classes=6))
    images = grey(2, 64)
    without, _ = network.apply(images, train=True)
    np.testing.assert_array_equal(network.apply(images, train=True, key=jax.random.key(0))[0], without)


@pytest.mark.parametrize("name", ["sequential_cnn", "sequential_cnn_v2"])
def test_bfloat16_is_close_to_float32(name):
    size = 12 if name.endswith("v2") else 32
    images = grey(4, size)
    logits = {}
    for dtype in ("bfloat16", "float32"):
        network = Network.from_model(create(name, classes=6, dtype=dtype, image_size=size))
        logits[dtype], stats = jax.jit(lambda n: n.apply(images, train=True, key=jax.random.key(0)))(network)
        assert {leaf.dtype for leaf in jax.tree.leaves(stats)} <= {np.dtype("float32")}
        assert logits[dtype].dtype == jnp.float32
    assert 1e-5 < relative_error(logits["bfloat16"], logits["float32"]) < 0.05


def test_receptive_fields_and_grad_cam():
    network = Network.from_model(create("sequential_cnn", classes=6))
    field = list(receptive_fields(network, image_size=64).values())[-1]
    # 3, 2x2/2, 3 at stride 2, 2x2/2, 3 at stride 4, 2x2/2
    assert (field.size, field.stride, field.whole) == (1 + 2 + 1 + 4 + 2 + 8 + 4, 8, False)
    second = Network.from_model(create("sequential_cnn_v2", classes=6, image_size=8))
    field = list(receptive_fields(second, image_size=64).values())[-1]
    assert (field.size, field.stride, field.whole) == (7, 1, False)
    maps = saliency(network, np.asarray(grey(2, 64)), [0, 5])
    assert maps.shape == (2, 2, 6, 6)
    assert maps.max((2, 3)).min() > 0


def test_other_image_sizes_are_refused():
    network = Network.from_model(create("sequential_cnn", classes=6))
    for shape in ((2, 72, 72, 1), (2, 64, 96, 1)):
        with pytest.raises(CxrError, match=r"64 x 64 px, .* option image_size"):
            jax.eval_shape(lambda n, i: n.apply(i)[0], network, jax.ShapeDtypeStruct(shape, jnp.uint8))
    larger = Network.from_model(create("sequential_cnn", classes=6, image_size=72))
    assert jax.eval_shape(
        lambda n, i: n.apply(i)[0], larger, jax.ShapeDtypeStruct((2, 72, 72, 1), jnp.uint8)
    ).shape == (2, 6)


def test_training_with_dropout_needs_a_key():
    network = Network.from_model(create("sequential_cnn", classes=6))
    with pytest.raises(CxrError, match="needs a random key"):
        jax.eval_shape(lambda n, i: n.apply(i, train=True)[0], network, jax.ShapeDtypeStruct((2, 64, 64, 1), jnp.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 21}, "image_size 21 is too small for 3 stages"),
        ({"image_size": 0}, "image_size must be"),
        ({"widths": ()}, "widths must be a sequence of at least one"),
        ({"widths": (8, 0)}, "widths must be a whole number above 0"),
        ({"units": 128}, "units must be a sequence"),
        ({"dropout": 1}, "dropout must be at least 0 and below 1"),
        ({"drop": 0.1}, "unknown option of sequential_cnn 'drop': did you mean 'dropout'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(CxrError, match=message):
        create("sequential_cnn", classes=6, **options)


def test_simple_cnn_parameter_count():
    assert parameter_count(create("simple_cnn", classes=14)) == 129_870


def test_simple_cnn_maps_have_the_sizes_of_valid_convolutions():
    network = Network.from_model(create("simple_cnn", classes=14))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    features = jax.eval_shape(lambda network, images: network.model().features(images), network, images)
    assert {name: maps.shape for name, maps in features.items()} == {
        "stage1": (2, 111, 111, 32), "stage2": (2, 54, 54, 64), "final": (2, 26, 26, 128),
    }  # fmt: skip


def test_simple_cnn_pooling_and_relu_commute():
    model = create("simple_cnn", classes=2, seed=3)
    images = jnp.asarray(np.random.default_rng(0).random((1, 24, 22, 3)), jnp.float32)
    swapped = jax.nn.relu(model.stage1.conv(images)).reshape(1, 11, 2, 10, 2, 32).max((2, 4))
    np.testing.assert_array_equal(model.features(images)["stage1"], swapped)


def test_simple_cnn_refuses_small_images():
    network = Network.from_model(create("simple_cnn", classes=2))
    for size in (8, 18):
        with pytest.raises(CxrError, match="too small"):
            jax.eval_shape(lambda n, i: n.apply(i)[0], network, jax.ShapeDtypeStruct((1, size, size, 1), jnp.uint8))
