"""A training step with image rows split over devices equals the step of one device, for every network family."""

import jax
import numpy as np
import optax
import pytest

from cxrjax.data import Batch
from cxrjax.distributed.mesh import batch_shardings, make_mesh, replicated
from cxrjax.distributed.placement import put_batch
from cxrjax.errors import CxrError
from cxrjax.models import create
from cxrjax.models.network import Network
from cxrjax.planning.compiled_memory import parse_collectives
from cxrjax.train.experiment import Experiment
from cxrjax.train.state import TrainState
from cxrjax.train.step import make_train_step

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

DENSENET = {"growth_rate": 4, "block_config": (1, 1, 1), "stem_channels": 4}
HRNET = {"num_modules": (1, 1), "width": 4, "stem_channels": 4, "neck": "eighth"}
EFFICIENTNET = {"block_config": ((1, 3, 1, 8, 1), (4, 3, 2, 8, 1), (4, 5, 2, 8, 2))}

# Network, options, rows and columns of the images, meshes of data x space devices. Maps of 72 rows become 36, 18 and 9,
# and those of 64 become 4: fewer than there are devices, or not divisible by their number.
CASES = [
    ("densenet_small", DENSENET | {"pooling": "log-sum-exp"}, (72, 32), [(1, 8)]),
    ("resnet_small", {"pooling": "average+max"}, (72, 32), [(2, 4), (4, 2)]),
    ("hrnet_small", HRNET, (64, 64), [(1, 8)]),
    ("efficientnet_small", EFFICIENTNET, (72, 32), [(2, 4)]),
    ("attention_fusion_small", {"match": "up"}, (64, 32), [(1, 4)]),
    ("attention_fusion_small", {"attention": "cross", "match": "down"}, (72, 32), [(2, 2)]),
    pytest.param("fhrnet_small", {"crop": 0}, (64, 64), [(1, 4)], marks=pytest.mark.slow),
    ("simple_cnn", {}, (40, 40), [(1, 2)]),
    ("sequential_cnn_v1", {"image_size": 40, "units": (8,)}, (40, 40), [(2, 4)]),
    ("sequential_cnn_v2", {"image_size": 24, "units": (8,), "widths": (4, 8)}, (24, 24), [(1, 8)]),
]

# Like CASES, but all maps divide evenly among the devices, so that none is gathered.
EVEN = [
    ("densenet_small", DENSENET | {"stem_pool": "3x3", "stem_kernel": 7}, (64, 32), [(1, 2), (2, 4)]),
    ("resnet_small", {"block": "bottleneck", "width": 4, "stem_pool": "3x3"}, (128, 32), [(1, 8)]),
    ("hrnet_small", HRNET, (64, 64), [(2, 4)]),
    ("efficientnet_small", EFFICIENTNET | {"stochastic_depth": 0.5, "dropout": 0.2}, (64, 32), [(1, 4)]),
    ("attention_fusion_small", {"match": "up", "dense": {"block_config": (1, 1)}}, (64, 32), [(1, 4)]),
]


def make_batch(rows, columns, n=4):
    rng = np.random.default_rng(0)
    return Batch(
        image=rng.integers(0, 256, (n, rows, columns, 1), np.uint8),
        label=rng.integers(0, 2, (n, 3)).astype(np.float32),
        label_mask=rng.random((n, 3)) < 0.8,
        example_mask=np.ones(n, bool),
        record=np.arange(n, dtype=np.int32),
    )


def run_step(network, shape, mesh):
    """Return gradients, running statistics and loss of one step, and its collectives; the optimizer keeps gradients."""
    optimizer = optax.trace(decay=0.0)
    step = make_train_step(network, optimizer, optax.constant_schedule(0.1), mesh)
    state = jax.device_put(TrainState.create(network, optimizer, 0), replicated(mesh))
    batch = put_batch(make_batch(*shape), batch_shardings(mesh))
    compiled = step.lower(state, batch).compile(compiler_options=QUICK)
    state, metrics = compiled(state, batch)
    collectives = parse_collectives(compiled.as_text() or "")
    return jax.device_get((state.optimizer.trace, state.stats, metrics["loss"])), collectives


def relative_error(tree, expected):
    flat = [np.concatenate([np.zeros(0), *map(np.ravel, jax.tree.leaves(t))]) for t in (tree, expected)]
    norm = np.linalg.norm(flat[1])
    return np.linalg.norm(flat[0] - flat[1]) / norm if norm else float(np.any(flat[0]))


def compare(name, options, shape, meshes, dtype):
    """Return the largest relative errors of gradients, statistics and loss over the meshes, and the collectives."""
    network = Network.from_model(create(name, classes=3, dtype=dtype, **options))
    single, _ = run_step(network, shape, make_mesh(1, 1))
    assert np.isfinite(relative_error(jax.tree.map(np.zeros_like, single[0]), single[0]))
    errors, collectives = [], []
    for mesh in meshes:
        results, calls = run_step(network, shape, make_mesh(*mesh))
        collectives += calls
        errors.append([relative_error(*pair) for pair in zip(results, single, strict=True)])
    return np.max(errors, axis=0), collectives


@pytest.mark.usefixtures("shallow_branches")
@pytest.mark.parametrize(("name", "options", "shape", "meshes"), CASES)
def test_float64(name, options, shape, meshes):
    with jax.enable_x64(True):
        errors, _ = compare(name, options, shape, meshes, "float64")
    assert errors.max() < 1e-10, errors


@pytest.mark.parametrize(("name", "options", "shape", "meshes"), EVEN)
def test_float64_without_gathering(name, options, shape, meshes):
    with jax.enable_x64(True):
        errors, calls = compare(name, options | {"pooling": "average"}, shape, meshes, "float64")
    assert errors.max() < 1e-10, errors
    assert {call.kind for call in calls} == {"all-reduce", "collective-permute"}, calls


@pytest.mark.parametrize(
    ("name", "options", "shape", "bound"),
    [
        ("densenet_small", {"growth_rate": 4, "block_config": (1, 1), "stem_channels": 4}, (64, 32), 0.2),
        ("resnet_small", {"width": 4}, (64, 32), 0.3),
        ("hrnet_small", HRNET, (64, 64), 0.8),
        ("efficientnet_small", EFFICIENTNET, (64, 32), 0.1),
        ("attention_fusion_small", {"match": "up", "dense": {"block_config": (1, 1)}}, (64, 32), 0.1),
    ],
)
def test_rounding(name, options, shape, bound):
    """Splitting rows changes the order of sums, and so the rounding: by units of 6e-8 in float32.

    In bfloat16 a unit is 4e-3 and decides which ReLUs are active. Over 12 batches the error of DenseNet's gradient was
    0.02 to 0.09 on one device and 0.02 to 0.11 with split rows. With this batch it was 0.14 and 0.12 (ResNet), 0.31 and
    0.39 (HRNet), 0.02 and 0.02 (EfficientNet), 0.04 and 0.03 (fusion).
    """

    def results(dtype, *mesh):
        network = Network.from_model(create(name, classes=3, dtype=dtype, **options, pooling="average"))
        return run_step(network, shape, make_mesh(*mesh))[0]

    def errors(values):
        return np.array([relative_error(*pair) for pair in zip(values, exact, strict=True)])

    exact = results("float32", 1, 1)
    assert (errors(results("float32", 2, 4)) < [1e-5, 1e-6, 1e-6]).all()
    assert (errors(results("bfloat16", 2, 4)) < [bound, 5e-3, 5e-3]).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "mesh.space=3",
            "config key data.image_size = 32 rows cannot be divided over mesh space=3: choose 30 or 33, or set "
            "mesh.space to 2 or 4",
        ),
        (
            "mesh.data=3",
            "train.batch_size = 4 images cannot be divided over mesh data=3: choose 3 or 6, or set mesh.data to 2",
        ),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused_before_training(tiny, override, message):
    with pytest.raises(CxrError, match=message):
        _ = Experiment.open(tiny(override)).accumulation_steps
