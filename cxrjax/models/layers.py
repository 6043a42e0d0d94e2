"""The parts every family is made of: convolution, batch norm, pooling, and recomputation by layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from cxrjax.errors import CxrError
from cxrjax.models.depthwise import depthwise

Maps = Float[Array, "B H W C"]


def storage(dtype) -> np.dtype:
    """The type of parameters and batch statistics, and of norm arithmetic, for a compute type: float32 at least."""
    return np.promote_types(dtype, np.float32)


_drawing = ContextVar("drawing", default=True)


@contextmanager
def undrawn() -> Iterator[None]:
    """Initial values are 0 inside: drawing hundreds of millions takes seconds, and sometimes only shapes matter."""
    token = _drawing.set(False)
    try:
        yield
    finally:
        _drawing.reset(token)


class _NoKeys:
    """What nnx layers get for the random keys that they ask for; our initialisers do without."""

    def params(self) -> None:
        """No key."""


class Maker:
    """Makes the layers of one network: it holds what they have in common.

    Initial values are drawn with NumPy, so that they depend on the seed alone (not on devices), and that
    building a network compiles nothing.

    Args:
      dtype: compute type.
      seed: of the initial values.
      fan: what the deviation of a convolution's initial values goes by: its connections "in" or "out".
    """

    def __init__(self, dtype, seed: int, *, fan: Literal["in", "out"] = "in"):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise CxrError(f"seed must be a whole number, 0 or above, not {seed!r}")
        self.dtype = np.dtype(dtype)
        self.param_dtype = storage(dtype)
        self._fan = fan
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._unused: Any = _NoKeys()

    def _kaiming_normal(self, _key, shape, dtype) -> jax.Array:
        if not _drawing.get():
            return jnp.zeros(shape, dtype)
        height, width, inputs, outputs = shape
        deviation = np.sqrt(2 / (height * width * (inputs if self._fan == "in" else outputs)))  # arXiv:1502.01852
        return jnp.asarray(self._generator.standard_normal(shape) * deviation, dtype)

    def _torch_uniform(self, _key, shape, dtype) -> jax.Array:
        if not _drawing.get():
            return jnp.zeros(shape, dtype)
        bound = 1 / np.sqrt(shape[0])  # what torch.nn.Linear does
        return jnp.asarray(self._generator.uniform(-bound, bound, shape), dtype)

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> nnx.Conv:
        """A square convolution with PyTorch's padding: `padding` zeros on each side."""
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self._kaiming_normal,
            conv_general_dilated=depthwise if groups == inputs == outputs > 1 else jax.lax.conv_general_dilated,
            rngs=self._unused,
        )

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        """A fully connected layer, its bias zero at first; it computes in the type of its parameters."""
        return nnx.Linear(
            inputs,
            outputs,
            dtype=self.param_dtype,
            param_dtype=self.param_dtype,
            kernel_init=self._torch_uniform,
            rngs=self._unused,
        )

    def norm(self, channels: int) -> "BatchNorm":
        """Batch norm as PyTorch has it by default."""
        return BatchNorm(channels, dtype=self.dtype)


class BatchNorm(nnx.Module):
    """Batch norm over B, H and W that keeps PyTorch's running statistics.

    Two things differ from `nnx.BatchNorm`: the running variance is the unbiased one, and the result has the
    compute type. Statistics and arithmetic are float32 (float64 for float64). Under a sharded `jax.jit` the means
    are those of the global batch, whatever the mesh: batch norm is synchronised.

    Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    def __init__(self, channels: int, *, dtype, momentum: float = 0.1, epsilon: float = 1e-5):
        wide = storage(dtype)
        self.scale = nnx.Param(jnp.ones(channels, wide))
        self.bias = nnx.Param(jnp.zeros(channels, wide))
        self.mean = nnx.BatchStat(jnp.zeros(channels, wide))
        self.var = nnx.BatchStat(jnp.ones(channels, wide))
        self.dtype = np.dtype(dtype)
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, maps: Maps, *, train: bool) -> Maps:
        """Normalise; in training by the batch's statistics, which also enter the running ones."""
        wide = maps.astype(storage(self.dtype))
        mean, var = self._batch_statistics(wide) if train else (self.mean[...], self.var[...])
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * scale  # one multiplication and addition per value, as PyTorch does
        return (wide * _spread(scale) + _spread(offset)).astype(self.dtype)

    def _batch_statistics(self, maps: Maps) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Mean and biased variance of the batch; moves the running statistics."""
        values = maps.size // maps.shape[-1]
        if values < 2:
            raise CxrError("batch norm cannot train on one value per channel: use a larger batch or larger images")
        # One pass over the maps: moments about the running mean, which keeps E[x^2] - E[x]^2 from cancelling.
        about = jax.lax.stop_gradient(self.mean[...])
        shifted = maps - _spread(about)
        offset = shifted.mean((0, 1, 2))
        var = jnp.maximum(jnp.square(shifted).mean((0, 1, 2)) - jnp.square(offset), 0)
        mean = about + offset
        for running, batch in ((self.mean, mean), (self.var, var * (values / (values - 1)))):
            moved = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(batch)
            running.set_value(moved)  # `running[...] = moved` walks all that is traced so far: quadratic in depth
        return mean, var


def _spread(per_channel: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return per_channel.reshape(1, 1, 1, -1)


class ConvNorm(nnx.List):
    """A convolution, padded by half its kernel, and its norm: "0" and "1" in published names."""

    def __init__(
        self,
        make: Maker,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ):
        conv = make.conv(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)
        super().__init__([conv, make.norm(outputs)])

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Both, without an activation."""
        conv, norm = self
        return norm(conv(maps), train=train)

    def active(self, maps: Maps, train: bool) -> Maps:
        """Both, and the activation."""
        return self.activation(self(maps, train))

    @staticmethod
    def activation(maps: Maps) -> Maps:
        """ReLU."""
        return nnx.relu(maps)


def max_pool(maps: Maps, window: int, stride: int, padding: int = 0) -> Maps:
    """Maximum over square windows, as `torch.nn.MaxPool2d`: what does not fill a window is left out.

    Windows that neither overlap nor are padded are an axis to reduce: on the CPU a training step of the small DenseNet
    takes half the time it takes with the gradient of `reduce_window`. Equal largest values then share the gradient.
    """
    if window == stride and padding == 0:
        _check_fits(maps, window, padding)
        B, H, W, C = maps.shape
        whole = maps[:, : H // window * window, : W // window * window]
        return whole.reshape(B, H // window, window, W // window, window, C).max((2, 4))
    return _pool(maps, -np.inf, jax.lax.max, window, stride, padding)


STEM_POOLS = {
    "3x3": lambda maps: max_pool(maps, 3, 2, padding=1),
    "2x2": lambda maps: max_pool(maps, 2, 2),
    "none": lambda maps: maps,
}


def average_pool(maps: Maps, window: int, stride: int) -> Maps:
    """Mean over square windows, as `torch.nn.AvgPool2d`."""
    return _pool(maps, 0.0, jax.lax.add, window, stride, 0) / window**2


def _pool(maps: Maps, start: float, combine: Callable, window: int, stride: int, padding: int) -> Maps:
    _check_fits(maps, window, padding)
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(maps, start, combine, (1, window, window, 1), (1, stride, stride, 1), sides)


def _check_fits(maps: Maps, window: int, padding: int) -> None:
    height, width = maps.shape[1:3]
    if min(height, width) + 2 * padding < window:
        raise CxrError(
            f"the images are too small for this network: a {window} x {window} window meets maps of "
            f"{height} x {width}; use larger images or fewer stages"
        )


@cache
def recomputed(method: Callable, remat: str) -> Callable:
    """An unbound layer method as a function of (layer, inputs, train).

    With `remat="layer"` the backward pass recomputes what the method computes instead of keeping it, so only its
    inputs stay in memory; results and running statistics are the same, and statistics move once. (`jax.checkpoint`
    on a method would lose them.)
    """
    return nnx.remat(method, static_argnums=(2,), graph=False) if remat == "layer" else method
