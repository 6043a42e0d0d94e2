"""torchxrayvision's own DenseNet, saved as its authors do: a whole module."""

import importlib
import sys
import warnings

import jax
import numpy as np
import pytest
from parity import relative_error

from cxrjax.models.input_spec import XRV
from cxrjax.weights import convert, load_converted

torch = pytest.importorskip("torch", reason="needs PyTorch")
KEPT_ALIVE = []


@pytest.fixture(scope="module")
def xrv():
    """The package, also where torchvision's C extension does not load: two operators, not needed here, are declared."""
    importlib.util.find_spec("torchxrayvision") or pytest.skip("needs torchxrayvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torchxrayvision")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torchxrayvision")]:
            del sys.modules[name]
        from torch import library

        operators = library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT_ALIVE.append(operators)
        return importlib.import_module("torchxrayvision")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("whole_module", [False, True])
def test_logits_agree(tmp_path, xrv, legacy, whole_module):
    torch.manual_seed(0)
    model = xrv.models.DenseNet(weights=None, num_classes=18, in_channels=1).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training; otherwise running statistics are 0 and 1
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
    model.op_threshs = torch.linspace(0.1, 0.9, 18)
    model.pathologies = xrv.models.DenseNet.targets
    file = tmp_path / "xrv.pt"
    torch.save(model if whole_module else model.state_dict(), file, _use_new_zipfile_serialization=not legacy)
    report = convert(file, "densenet121", tmp_path / "out")
    assert report.card.labels == (tuple(model.pathologies) if whole_module else ())
    assert (report.card.classes, report.card.input_spec) == (18, XRV)
    assert len(report.used) + len(report.dropped) == len(model.state_dict())
    assert "op_threshs" in report.dropped
    grey = np.random.default_rng(0).integers(0, 256, (2, 96, 80, 1), np.uint8)
    theirs = torch.tensor(xrv.utils.normalize(grey.astype(np.float32), 255).transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits = model.classifier(model.features2(theirs)).numpy()
    network = load_converted(tmp_path / "out")
    ours = jax.jit(lambda network: network.apply(grey)[0])(network)
    assert relative_error(ours, logits) < 1e-4
