"""What a network expects of its images, and the preparation of grey images for it on the device."""

import math
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cxrjax.errors import CxrError
from cxrjax.models.layers import param_dtype


@dataclass(frozen=True)
class InputSpec:
    """What a network expects of its images.

    Grey values 0..255 are scaled to `low`..`high`, repeated to `channels` channels, and normalised to
    (value - mean) / std per channel.

    Attributes:
      channels: number of channels.
      mean, std: per channel, on the scale of `low`..`high`.
      low, high: values of black (0) and white (255) before normalisation.
    """

    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.channels < 1 or len(self.mean) != self.channels or len(self.std) != self.channels:
            raise CxrError(
                f"an InputSpec of {self.channels} channels needs as many means and deviations, "
                f"not {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std, self.low, self.high)):
            raise CxrError(f"an InputSpec must hold finite numbers only: {self}")
        if min(self.std) <= 0:
            raise CxrError(f"an InputSpec needs deviations above 0, not {self.std}")
        if self.low >= self.high:
            raise CxrError(f"an InputSpec needs low < high, not {self.low} and {self.high}")


IMAGENET = InputSpec()
"""Three channels, normalised as torchvision's weights expect."""

UNIT = InputSpec(channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
"""Three channels of 0..1."""

GREY = InputSpec(channels=1, mean=(0.5,), std=(0.25,))
"""One channel of -2..2, roughly centred for radiographs."""

XRV = InputSpec(channels=1, mean=(0.0,), std=(1.0,), low=-1024.0, high=1024.0)
"""One channel of -1024..1024, as torchxrayvision's weights expect."""


def one_channel(spec: InputSpec) -> InputSpec:
    """Return the spec of one channel that replaces several grey ones: the same values if all are normalised alike.

    Otherwise its mean and deviation are such that as many copies of it have the same sum as the normalised channels.
    """
    if len(set(zip(spec.mean, spec.std, strict=True))) == 1:
        mean, std = spec.mean[0], spec.std[0]
    else:
        precision = sum(1 / std for std in spec.std)
        mean = sum(mean / std for mean, std in zip(spec.mean, spec.std, strict=True)) / precision
        std = spec.channels / precision
    return replace(spec, channels=1, mean=(mean,), std=(std,))


INPUT_SPECS = {
    "imagenet": IMAGENET,
    "imagenet-grey": one_channel(IMAGENET),
    "unit": UNIT,
    "unit-grey": one_channel(UNIT),
    "grey": GREY,
    "xrv": XRV,
}
"""Input specs by their names in a config."""


def input_spec_name(spec: InputSpec) -> str:
    """Return a spec's name in a config; a description if it has no name."""
    return next((name for name, known in INPUT_SPECS.items() if known == spec), str(spec))


def check_range(images: Float[np.ndarray, "B H W C"], spec: InputSpec) -> None:
    """Refuse prepared images whose values cannot have been normalised as the network expects.

    Values must lie in the range from black to white, widened by its own width on both sides. Each image must spread
    over a hundredth of that range at least, and if the range has negative values some must be negative. The result of
    `prepare` needs no check.

    Raises:
      CxrError: values out of range, without spread, not finite, or of another number of channels.
    """
    if images.ndim != 4 or images.shape[-1] != spec.channels:
        raise CxrError(f"prepared images must be B x H x W x {spec.channels}, not {' x '.join(map(str, images.shape))}")
    low = min((spec.low - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True))
    high = max((spec.high - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True))
    least, most = float(images.min()), float(images.max())
    width = high - low
    in_range = low - width <= least and most <= high + width  # False for NaN too
    spread = np.ptp(images.reshape(len(images), -1), axis=1).min()
    if not in_range or spread < width / 100 or (low < 0 <= least):
        raise CxrError(
            f"prepared images hold values from {least:.4g} to {most:.4g}, but this network expects black at {low:.4g} "
            f"and white at {high:.4g}: give grey uint8 images, which are scaled here, or normalise them to that range"
        )


def prepare(images: UInt8[Array, "B H W 1"], spec: InputSpec, dtype) -> Float[Array, "B H W C"]:
    """Scale, repeat and normalise grey images 0..255; arithmetic in float32 or wider, result in `dtype`.

    Raises:
      CxrError: `images` are not uint8, or not B x H x W x 1.
    """
    if images.dtype != jnp.uint8:
        raise CxrError(
            f"a network takes grey images as uint8 0..255, not {images.dtype}: leave scaling to its InputSpec"
        )
    if images.ndim != 4 or images.shape[-1] != 1:
        raise CxrError(f"a network takes grey images of shape B x H x W x 1, not {' x '.join(map(str, images.shape))}")
    wide = param_dtype(dtype)
    scale = [(spec.high - spec.low) / 255 / std for std in spec.std]
    shift = [(spec.low - mean) / std for mean, std in zip(spec.mean, spec.std, strict=True)]
    per_channel = (1, 1, 1, spec.channels)
    prepared = images.astype(wide) * jnp.array(scale, wide).reshape(per_channel)
    return (prepared + jnp.array(shift, wide).reshape(per_channel)).astype(dtype)
