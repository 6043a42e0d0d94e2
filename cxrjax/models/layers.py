"""Layers that every family uses: convolution, linear layer, batch norm, and recomputation (remat)."""

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
from cxrjax.models.convolution import conv2d, depthwise_conv2d, dot_general
from cxrjax.models.spatial import Maps


def param_dtype(dtype) -> np.dtype:
    """Return the type of parameters, batch statistics and norm arithmetic for a compute type: float32 or wider."""
    return np.promote_types(dtype, np.float32)


_init_skipped = ContextVar("init_skipped", default=False)


@contextmanager
def skip_init() -> Iterator[None]:
    """Set the parameters of networks built inside to zero, where only shapes matter: drawing values takes seconds."""
    token = _init_skipped.set(True)
    try:
        yield
    finally:
        _init_skipped.reset(token)


class _NoRngs:
    """Stands in for `nnx.Rngs`: our initializers need no JAX keys."""

    def params(self) -> None:
        """Return no key."""


class LayerFactory:
    """Makes the layers of one network.

    Initial values are drawn with NumPy: they depend on the seed alone (not on devices), and building a network
    compiles nothing.

    `fan_mode` says whether the deviation of a convolution's initial values follows its fan "in" or fan "out" (He et al.
    2015, arXiv:1502.01852).
    """

    def __init__(self, dtype, seed: int, *, fan_mode: Literal["in", "out"] = "in"):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise CxrError(f"seed must be a whole number, 0 or above, not {seed!r}")
        self.dtype = np.dtype(dtype)
        self.param_dtype = param_dtype(dtype)
        self._fan_mode = fan_mode
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._rngs: Any = _NoRngs()

    def _zeros(self, _key, shape, dtype) -> jax.Array:
        return jax.device_put(np.broadcast_to(np.zeros((), dtype), shape))  # takes no host memory

    def _kaiming_normal(self, _key, shape, dtype) -> jax.Array:
        if _init_skipped.get():
            return self._zeros(_key, shape, dtype)
        height, width, in_channels, out_channels = shape
        deviation = np.sqrt(2 / (height * width * (in_channels if self._fan_mode == "in" else out_channels)))
        return jax.device_put((self._generator.standard_normal(shape) * deviation).astype(dtype))

    def _torch_uniform(self, _key, shape, dtype) -> jax.Array:
        if _init_skipped.get():
            return self._zeros(_key, shape, dtype)
        bound = 1 / np.sqrt(shape[0])  # as torch.nn.Linear
        return jax.device_put(self._generator.uniform(-bound, bound, shape).astype(dtype))

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> nnx.Conv:
        """Make a square convolution with PyTorch's padding: `padding` zeros on each side."""
        is_depthwise = groups == in_channels == out_channels > 1
        return nnx.Conv(
            in_channels,
            out_channels,
            (kernel_size, kernel_size),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self._kaiming_normal,
            bias_init=self._zeros,
            conv_general_dilated=depthwise_conv2d if is_depthwise else conv2d,
            rngs=self._rngs,
        )

    def linear(self, in_features: int, out_features: int) -> nnx.Linear:
        """Make a fully connected layer with a bias of zero; it computes in the type of its parameters."""
        return nnx.Linear(
            in_features,
            out_features,
            dtype=self.param_dtype,
            param_dtype=self.param_dtype,
            kernel_init=self._torch_uniform,
            bias_init=self._zeros,
            dot_general=dot_general,
            rngs=self._rngs,
        )

    def norm(self, channels: int) -> "BatchNorm":
        """Make a batch norm with PyTorch's defaults."""
        return BatchNorm(channels, dtype=self.dtype)


Moments = tuple[Float[Array, " C"], Float[Array, " C"]]
"""Mean and biased variance over a batch, per channel."""


class BatchNorm(nnx.Module):
    """Batch norm over B, H and W with PyTorch's running statistics (Ioffe and Szegedy 2015, arXiv:1502.03167).

    It differs from `nnx.BatchNorm` in two ways: the running variance is the unbiased one, and the result has the
    compute type. Statistics and arithmetic are float32 (float64 for float64). Under a sharded `jax.jit` the moments
    are those of the global batch on any mesh: batch norm is synchronised.
    """

    def __init__(self, channels: int, *, dtype, momentum: float = 0.1, epsilon: float = 1e-5):
        wide = param_dtype(dtype)
        zeros, ones = np.zeros(channels, wide), np.ones(channels, wide)  # NumPy: making JAX's would compile
        self.scale, self.bias = nnx.Param(jax.device_put(ones)), nnx.Param(jax.device_put(zeros))
        self.mean, self.var = nnx.BatchStat(jax.device_put(zeros)), nnx.BatchStat(jax.device_put(ones))
        self.dtype = np.dtype(dtype)
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, maps: Maps, *, train: bool, moments: Moments | None = None) -> Maps:
        """Normalise the maps; in training by the batch's moments, which also update the running statistics.

        `moments` are `self.moments(maps)`, where these are already computed.
        """
        wide = maps.astype(param_dtype(self.dtype))
        if train:
            mean, var = moments or self.moments(wide)
            self._update_running(mean, var, maps.size // maps.shape[-1])
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * scale  # one multiplication and addition per value, as PyTorch does
        return (wide * _per_channel(scale) + _per_channel(offset)).astype(self.dtype)

    def moments(self, maps: Maps, first_channel: int = 0) -> Moments:
        """Return the batch's mean and biased variance of maps that are this norm's channels from `first_channel` on."""
        if maps.size // maps.shape[-1] < 2:
            raise CxrError("batch norm cannot train on one value per channel: use a larger batch or larger images")
        running_mean = self.mean[...][first_channel : first_channel + maps.shape[-1]]
        return _moments(maps, jax.lax.stop_gradient(running_mean))

    def _update_running(self, mean: Float[Array, " C"], var: Float[Array, " C"], count: int) -> None:
        """Move the running statistics towards the moments of a batch with `count` values per channel."""
        for running, batch in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
            updated = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(batch)
            running.set_value(updated)  # `running[...] = updated` walks all traced code: quadratic in depth


@jax.custom_vjp
def _moments(maps: Maps, shift: Float[Array, " C"]) -> Moments:
    """Compute moments in the type of `shift`, in one pass as E[x^2] - E[x]^2 of the shifted maps.

    `shift` is the running mean, near which this does not cancel. The backward pass keeps the maps as they are, not
    shifted ones of a wider type.
    """
    shifted = maps.astype(shift.dtype) - _per_channel(shift)
    offset = shifted.mean((0, 1, 2))
    return shift + offset, jnp.maximum(jnp.square(shifted).mean((0, 1, 2)) - jnp.square(offset), 0)


def _moments_fwd(maps: Maps, shift: Float[Array, " C"]) -> tuple[Moments, tuple[Maps, Float[Array, " C"]]]:
    mean, var = _moments(maps, shift)
    return (mean, var), (maps, mean)


def _moments_bwd(residuals: tuple[Maps, Float[Array, " C"]], cotangents: Moments) -> tuple[Maps, Any]:
    maps, mean = residuals
    d_mean, d_var = (_per_channel(cotangent) * (maps.shape[-1] / maps.size) for cotangent in cotangents)
    d_maps = d_mean + 2 * d_var * (maps.astype(mean.dtype) - _per_channel(mean))
    return d_maps.astype(maps.dtype), jnp.zeros_like(mean)


_moments.defvjp(_moments_fwd, _moments_bwd)


def _per_channel(values: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return values.reshape(1, 1, 1, -1)


class ConvNorm(nnx.List):
    """A convolution, padded by half its kernel, and its batch norm: "0" and "1" in published names."""

    def __init__(
        self,
        factory: LayerFactory,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ):
        padding = kernel_size // 2
        conv = factory.conv(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=bias
        )
        super().__init__([conv, factory.norm(out_channels)])

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Apply convolution and norm."""
        conv, norm = self
        return norm(conv(maps), train=train)

    def activated(self, maps: Maps, train: bool) -> Maps:
        """Apply convolution, norm and activation."""
        return self.activation(self(maps, train))

    @staticmethod
    def activation(maps: Maps) -> Maps:
        """Apply ReLU."""
        return nnx.relu(maps)


REMATS = ("none", "layer", "block", "full")
"""What the backward pass recomputes instead of storing; each level includes those before it."""


@cache
def maybe_remat(method: Callable, remat: str, level: str = "layer", static: tuple[int, ...] = (2,)) -> Callable:
    """Return an unbound method of a module as a function of (module, inputs, train, ...), rematerialised if asked.

    If `remat` includes `level`, the backward pass recomputes the method's intermediate values and only its inputs stay
    in memory. Results and running statistics are the same, and statistics are updated once (plain `jax.checkpoint` on
    a method would lose them). Levels nest: layers inside a recomputed block are recomputed again.

    `remat` is one of `REMATS`, and `level` what the method computes: a "layer", a "block", or a whole network ("full").
    `static` are the positions of the arguments that are not arrays.
    """
    recomputes = REMATS.index(remat) >= REMATS.index(level)
    return nnx.remat(method, static_argnums=static, graph=False) if recomputes else method


@jax.custom_vjp
def sum_gradients_early(maps: Any) -> Any:
    """Return the same maps; the backward pass sums their gradients from later layers before it goes further back.

    XLA would keep the gradients from all readers until the sum is needed: in a dense block that is one gradient of all
    maps per layer, all alive at once.
    """
    return maps


sum_gradients_early.defvjp(lambda maps: (maps, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
