import numpy as np
import pytest
from published_files import SMALL, state_dict

from cxrjax.models.input_spec import IMAGENET


@pytest.fixture(scope="session")
def small_weights() -> dict[str, np.ndarray]:
    """PyTorch's state dict of a small DenseNet with 3 channels and 5 outputs."""
    return state_dict("densenet_small", classes=5, input_spec=IMAGENET, **SMALL)


@pytest.fixture(scope="session")
def grey_weights() -> dict[str, np.ndarray]:
    """The same with 1 channel and other values."""
    return state_dict("densenet_small", classes=5, seed=1, **SMALL)
