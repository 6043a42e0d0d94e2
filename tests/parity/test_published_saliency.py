"""Saliency against PyTorch's autograd, and against the published implementations captum and grad-cam.

These two are in no dependency group, since grad-cam brings its own OpenCV: run `pip install --no-deps captum grad-cam
ttach` in a separate environment.
"""

from typing import Any

import jax
import numpy as np
import pytest
from load_published import load_published
from published_networks import _torchvision, published, torch

from cxrjax.explain.saliency import METHODS, baselines, saliency
from cxrjax.models import create
from cxrjax.models.input_spec import UNIT
from cxrjax.models.network import Network

FINDINGS = (7, 500)
STEPS = 5


@pytest.fixture(scope="module", params=["simple_cnn", "sequential_cnn"])
def name(request) -> str:
    """The second one's head reads each position on its own, so that its gradient differs between positions."""
    return request.param


@pytest.fixture(scope="module")
def original(name) -> Any:
    return published(name).eval()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    rng = np.random.default_rng(4)
    smooth = np.kron(rng.standard_normal((2, 8, 8)), np.ones((8, 8)))
    return (128 + 30 * smooth + 20 * rng.standard_normal(smooth.shape)).clip(0, 255).astype(np.uint8)[..., None]


def prepared(images: np.ndarray) -> Any:
    """Prepare images as the networks expect: grey values of 0 to 1 in three channels."""
    return torch.from_numpy(np.repeat(images, 3, axis=-1).transpose(0, 3, 1, 2) / 255)


def our_maps(name: str, original: Any, images: np.ndarray, method: str, **options: Any) -> np.ndarray:
    with jax.enable_x64(True):
        model = create(name, classes=1000, dtype="float64", input_spec=UNIT, dropout=0.0)
        load_published(model, {key: tensor.numpy() for key, tensor in original.state_dict().items()})
        return saliency(Network.from_model(model), images, FINDINGS, method=method, steps=STEPS, **options)


def split_network(original: Any) -> tuple[Any, Any]:
    """Split the network at its last feature maps."""
    children = list(original.named_children())
    end = [name for name, _ in children].index("stage3") + 1
    return tuple(torch.nn.Sequential(*(child for _, child in half)) for half in (children[:end], children[end:]))


def maps_and_gradients(original: Any, images: np.ndarray, finding: int) -> tuple[Any, Any, Any]:
    features, head = split_network(original)
    maps = features(prepared(images)).detach().requires_grad_()
    score = head(maps)[:, finding]
    (gradients,) = torch.autograd.grad(score.sum(), maps)
    return maps.detach(), gradients, score.detach()


def autograd_maps(original: Any, images: np.ndarray, finding: int, method: str) -> np.ndarray:
    """The method as in its paper, before the last ReLU; B x h x w."""
    if method == "integrated":
        image = prepared(images)
        baseline = prepared(baselines(images, "mean"))
        total = torch.zeros_like(image)
        for step in range(STEPS):
            point = (baseline + (step + 0.5) / STEPS * (image - baseline)).requires_grad_()
            total += torch.autograd.grad(original(point)[:, finding].sum(), point)[0]
        return ((image - baseline) * total / STEPS).sum(1).numpy()
    maps, gradients, score = maps_and_gradients(original, images, finding)
    if method == "gradcam":
        weights = gradients.mean((2, 3), keepdim=True)
    elif method == "layercam":
        weights = gradients.clamp(min=0)
    else:
        y = score.exp()[:, None, None, None]  # of the three derivatives of exp(S)
        denominator = 2 * y * gradients**2 + (maps.sum((2, 3), keepdim=True) * y * gradients**3)
        alpha = torch.where(gradients != 0, y * gradients**2 / denominator, torch.zeros_like(denominator))
        weights = (alpha * (y * gradients).clamp(min=0)).sum((2, 3), keepdim=True) / y
    return (weights * maps).sum(1).numpy()


@pytest.mark.parametrize("method", METHODS)
def test_maps_agree_with_autograd(name, original, images, method):
    maps = our_maps(name, original, images, method, baseline="mean", signed=True)
    for index, finding in enumerate(FINDINGS):
        expected = autograd_maps(original, images, finding, method)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(maps[:, index], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_captum_agrees(name, original, images):
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    black = our_maps(name, original, images, "integrated", signed=True)
    grad_cam = our_maps(name, original, images, "gradcam")
    for index, finding in enumerate(FINDINGS):
        theirs = attr.IntegratedGradients(original).attribute(
            prepared(images), torch.zeros_like(prepared(images)), target=finding, n_steps=STEPS,
            method="riemann_middle",
        ).sum(1).detach()  # fmt: skip
        np.testing.assert_allclose(black[:, index], theirs.numpy(), rtol=1e-5, atol=1e-6 * theirs.abs().max())
        cam = attr.LayerGradCam(original, original.stage3).attribute(
            prepared(images), target=finding, relu_attributions=True
        )
        cam = cam.detach()[:, 0].numpy()
        np.testing.assert_allclose(grad_cam[:, index], cam, rtol=1e-5, atol=1e-6 * cam.max())


@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "layercam"])
def test_grad_cam_agrees(name, original, images, method):
    _torchvision("resnet18")  # the package imports torchvision
    package = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam")
    kind = {"gradcam": package.GradCAM, "gradcam++": package.GradCAMPlusPlus, "layercam": package.LayerCAM}[method]
    ours = our_maps(name, original, images, method)
    for index, finding in enumerate(FINDINGS):
        maps, gradients, _ = (tensor.numpy() for tensor in maps_and_gradients(original, images, finding))
        with kind(original, [original.stage3]) as cam:
            # Its Grad-CAM++ adds 1e-6 to a denominator of squared gradients. In other units of the maps these are
            # larger, and nothing else changes.
            theirs = np.maximum(cam.get_cam_image(None, None, None, maps / 1e4, gradients * 1e4, False), 0)
        np.testing.assert_allclose(ours[:, index], theirs, rtol=1e-5, atol=1e-6 * theirs.max())
