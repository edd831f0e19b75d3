"""Networks from observations to parameters of an action distribution and values."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ppo_jax.envs.spaces import ACTION_MASK, Box, Dict, Discrete, Leaf, Space, leaves, shape_of
from ppo_jax.errors import ConfigError, unknown_name
from ppo_jax.ops.gated_recurrence import output_of
from ppo_jax.policy.distributions import MASKED, Head
from ppo_jax.policy.initializers import orthogonal
from ppo_jax.policy.recurrent import Memory, run

Convolutions = tuple[tuple[int, int, int], ...]
"""Features, width of the kernel and stride of each layer."""

CONVOLUTIONS: dict[str, Convolutions] = {
    "minatar_cnn": ((16, 3, 1),),  # Young & Tian 2019, arXiv:1903.03176, appendix A
    "nature_cnn": ((32, 8, 4), (64, 4, 2), (64, 3, 1)),  # Mnih et al. 2015, doi:10.1038/nature14236
}


class MLP(nn.Module):
    """Dense layers with orthogonal initialisation, each followed by an activation."""

    hidden_sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    layer_norm: bool = False
    """Normalise before each activation: Ba et al. 2016 (arXiv:1607.06450)."""
    dtype: Any = None
    """Here and below, the type of products and activations; None for that of the inputs."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., F]` to `[..., hidden_sizes[-1]]`."""
        for size in self.hidden_sizes:
            if self.layer_norm:
                x = self.activation(nn.LayerNorm(dtype=self.dtype)(_hidden(x, size, self.dtype)))
            else:
                x = _hidden(x, size, self.dtype, self.activation)
        return x


class Conv(nn.Module):
    """A square convolution as a matrix product with the patches of an image.

    Under `vmap` over seeds, where kernels differ, a convolution becomes a grouped one, which is
    slow; a product becomes a batched product. On a CPU the gradient of a layer of MinAtar's size
    takes less than half of a convolution's time, alone and under `vmap`. It has not been measured
    on a GPU. Patches of images of bytes are gathered as bytes and converted to floats afterwards,
    which reads a quarter of the memory.
    """

    features: int
    kernel: int
    stride: int = 1
    pads: bool = False
    """Pad with zeros, so that stride 1 keeps the size of the image (odd kernels)."""
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, height, width, channels]` to `[B, height', width', features]`."""
        if self.pads:
            margin = self.kernel // 2
            x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        # Positions of the kernel with stride 1; slices below apply the stride.
        height, width = (max(0, size - self.kernel + 1) for size in x.shape[1:3])
        if 0 in (height, width):
            raise ConfigError(
                f"an image must be as large as a convolution's kernel; got {x.shape[1:3]} and "
                f"{self.kernel}. Use smaller kernels, as minatar_cnn does."
            )
        patches = [
            x[:, i : i + height : self.stride, j : j + width : self.stride]
            for i in range(self.kernel)
            for j in range(self.kernel)
        ]
        x = jnp.concatenate(patches, axis=-1)
        x = from_bytes(x) if x.dtype == jnp.uint8 else x
        return _hidden(x, self.features, self.dtype, dot_general=_product_with_patches)


class CNN(nn.Module):
    """Convolutions without padding, each followed by an activation."""

    layers: Convolutions
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, height, width, channels]` to `[B, F]`."""
        for features, kernel, stride in self.layers:
            x = self.activation(Conv(features, kernel, stride, dtype=self.dtype)(x))
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def bytes_of_patches(self, shape: tuple[int, ...]) -> int:
        """Returns the maximum over layers of the float32 bytes of one image's patches.

        The shape of the image is `(height, width, channels)`.
        """
        height, width, channels = shape
        sizes = []
        for features, kernel, stride in self.layers:
            height, width = ((size - kernel) // stride + 1 for size in (height, width))
            sizes.append(4 * height * width * kernel**2 * channels)
            channels = features
        return max(sizes)


class ResNet(nn.Module):
    """The residual network of Espeholt et al. 2018 (arXiv:1802.01561), figure 3."""

    activation: Callable[[jax.Array], jax.Array]
    widths: tuple[int, ...] = (16, 32, 32)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, height, width, channels]` to `[B, F]`."""
        for width in self.widths:
            conv = partial(Conv, width, 3, pads=True, dtype=self.dtype)
            x = conv()(x)
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for _ in range(2):
                residual = conv()(self.activation(x))
                x = x + conv()(self.activation(residual))
        return self.activation(x).reshape(x.shape[0], math.prod(x.shape[1:]))

    def bytes_of_patches(self, shape: tuple[int, ...]) -> int:
        """Returns the maximum over layers of the float32 bytes of one image's patches.

        The shape of the image is `(height, width, channels)`.
        """
        height, width, channels = shape
        sizes = []
        for features in self.widths:
            sizes.append(4 * height * width * 9 * channels)
            # The other convolutions of a level see what the pooling leaves.
            height, width, channels = -(-height // 2), -(-width // 2), features
            sizes.append(4 * height * width * 9 * channels)
        return max(sizes)


class Torso(nn.Module):
    """Encodes any observation: images by `image`, all else flattened, then `dense` layers.

    Integers are one-hot, or embedded. Bytes of images are scaled to [0, 1].
    """

    space: Space
    image: Callable[[], nn.Module] | None
    """Makes the module that maps an image `[B, height, width, channels]` to `[B, F]`. None: images
    are flattened."""
    dense: Callable[[], nn.Module]
    """Makes the module that maps the features of all entries `[B, F]` to those of the torso."""
    embedding_size: int | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, obs: Any) -> jax.Array:
        """Maps `[B, ...]` to `[B, F]`."""
        # The space says how to read an array: an int32 may be an index or a number.
        entries = zip(leaves(self.space), jax.tree.leaves(obs), strict=True)
        features = [self._encode(leaf, x) for leaf, x in entries]
        x = self.dense()(features[0] if len(features) == 1 else jnp.concatenate(features, -1))
        # What follows is computed in single precision: recurrent states, logits, values, losses.
        return x if self.dtype is None else x.astype(jnp.float32)

    def _encode(self, leaf: Leaf, x: jax.Array) -> jax.Array:
        if isinstance(leaf, Box):
            is_bytes = is_image(leaf) and leaf.dtype == "uint8"
            if self.image is not None and is_image(leaf):
                return self.image()(x if is_bytes else x.astype(jnp.float32))
            x = from_bytes(x) if is_bytes else x.astype(jnp.float32)
            return x.reshape(x.shape[0], math.prod(x.shape[1:]))
        # An index has no order, so it is not a number for the network.
        sizes = (leaf.num_values,) if isinstance(leaf, Discrete) else leaf.num_values
        x = x.reshape(x.shape[0], len(sizes))
        if self.embedding_size is None:
            parts = [jax.nn.one_hot(x[:, i], size) for i, size in enumerate(sizes)]
        else:
            parts = [nn.Embed(size, self.embedding_size)(x[:, i]) for i, size in enumerate(sizes)]
        return jnp.concatenate(parts, axis=-1)


def is_image(leaf: Leaf) -> bool:
    """Returns whether the space has the axes height, width and channels."""
    return isinstance(leaf, Box) and len(leaf.shape) == 3


def from_bytes(image: jax.Array) -> jax.Array:
    """Returns an image of bytes as floating-point numbers in [0, 1]."""
    return image.astype(jnp.float32) / 255.0


class OutputLayer(nn.Module):
    """A dense layer of a few outputs, computed with the batch as the last axis.

    Products with a short last axis are slow on a CPU: the gradient of a kernel of 64 x 2 for 256
    samples takes 12.8 µs with the batch first and 0.7 µs with the batch last.
    """

    size: int
    gain: str
    """A key of `defaults.GAINS`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., F]` to `[..., size]`."""
        kernel = self.param("kernel", orthogonal(self.gain), (x.shape[-1], self.size))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.size,))
        # Without the barrier the compiler would fold the transpose into the product and undo this,
        # which it may do on other platforms.
        transposed = jax.lax.platform_dependent(
            kernel, cpu=lambda kernel: jax.lax.optimization_barrier(kernel.T), default=jnp.transpose
        )
        outputs = jax.lax.dot_general(
            transposed,
            x.reshape(math.prod(x.shape[:-1]), x.shape[-1]),
            dimension_numbers=(((1,), (1,)), ((), ())),
        )
        return (outputs + bias[:, None]).T.reshape(*x.shape[:-1], self.size)


class View(NamedTuple):
    """The part of an observation that an actor or a critic sees."""

    space: Space
    names: tuple[str, ...] | None
    """Entries of a dict observation; None for all of it."""

    def __call__(self, obs: Any) -> Any:
        """Returns the part of the observation that is seen."""
        return obs if self.names is None else {name: obs[name] for name in self.names}


def make_view(space: Space, names: tuple[str, ...] | None) -> View:
    """Returns the view of some entries of a dict observation; None is all but the action mask.

    Raises:
      ConfigError: the observation has no such entries.
    """
    if not isinstance(space, Dict):
        if names is not None:
            raise ConfigError(
                f"actor_keys and critic_keys need observations that are dicts; got {names} "
                f"and {space}. Leave them out."
            )
        return View(space, None)
    if names is None:
        names = tuple(name for name in space.names if name != ACTION_MASK)
    if not names or ACTION_MASK in names:
        raise ConfigError(
            f"actor_keys and critic_keys must name something to see, and not {ACTION_MASK}, which "
            f"is applied automatically; got {names}. Name other entries."
        )
    for name in names:
        if name not in space.names:
            raise unknown_name("entry of the observation", name, space.names)
    entries = dict(space.spaces)
    return View(Dict.of({name: entries[name] for name in names}), tuple(names))


class ActorCritic(nn.Module):
    """An actor and a critic over observations of any batch shape.

    Each has a torso, and a memory if any, of its own, unless the critic shares the actor's. The two
    are methods because a rollout needs only the actor: values come from batched calls afterwards.
    With memories, observations are sequences `[T, N, ...]`, and `state` holds the
    recurrent state of each part before them, `{"actor": …, "critic": …}`.
    """

    head: Head
    space: Space
    actor_view: View
    critic_view: View
    actor_torso: nn.Module
    critic_torso: nn.Module | None
    # Parameters in saved policies have the names of these fields.
    actor_memory: Memory | None
    critic_memory: Memory | None
    has_critic: bool = True

    def setup(self) -> None:
        """Makes the last layers; flax calls this."""
        self.actor_out = OutputLayer(self.head.num_outputs, "actor_gain")
        if self.has_critic:
            self.critic_out = OutputLayer(1, "critic_gain")
        if self.head.log_std_shape is not None:
            self.actor_log_std = _LogStd(self.head.log_std_shape)

    def __call__(
        self, obs: Any, state: Any = None, start: jax.Array | None = None
    ) -> tuple[Any, jax.Array | None]:
        """Returns distribution parameters `[..., *]` and values `[...]`, None without a critic."""
        if self.has_critic and self.critic_torso is not None:
            features, of_critic = self._features_of_both(obs, state, start)
        else:
            features = of_critic = self._features("actor", obs, state, start)[0]
        action_params = self._parametrize(features, obs)
        return action_params, self._value(of_critic) if self.has_critic else None

    def actor(self, obs: Any, state: Any = None, start: jax.Array | None = None) -> tuple[Any, Any]:
        """Returns distribution parameters `[..., *]`, and the actor's state after every step."""
        features, states = self._features("actor", obs, state, start)
        return self._parametrize(features, obs), states

    def critic(
        self, obs: Any, state: Any = None, start: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns values `[...]`, and the state of the critic's torso after every step."""
        features, states = self._features(self._value_part, obs, state, start)
        return self._value(features), states

    @property
    def is_separable(self) -> bool:
        """True if the critic can be differentiated after the actor at little cost.

        It is False where computing both together saves work: a shared torso, the loops of two
        memories, or patches of images. Images that an MLP flattens count as well: in Breakout they
        take most of the memory, and activations little.
        """
        return (
            self.has_critic
            and self.critic_torso is not None
            and self.critic_memory is None
            and not any(map(is_image, leaves(self.critic_view.space)))
        )

    @property
    def _value_part(self) -> str:
        """The part whose features the value is computed from."""
        return "actor" if self.critic_torso is None else "critic"

    def _features(
        self, part: str, obs: Any, state: Any, start: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        view, torso, memory = {
            "actor": (self.actor_view, self.actor_torso, self.actor_memory),
            "critic": (self.critic_view, self.critic_torso, self.critic_memory),
        }[part]
        x = self._apply_torso(torso, view, obs)
        if memory is None:
            return x, None
        assert start is not None, "a sequence has starts"
        states = memory(state[part], x, start)
        return output_of(states), {part: states}

    def _features_of_both(
        self, obs: Any, state: Any, start: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the features of actor and critic, which share no torso."""
        assert self.critic_torso is not None
        of_actor = self._apply_torso(self.actor_torso, self.actor_view, obs)
        # The first convolutions of both may share the patches of images, so these stay merged.
        if not any(map(is_image, leaves(self.critic_view.space))):
            obs = _unmerged(obs)
        of_critic = self._apply_torso(self.critic_torso, self.critic_view, obs)
        if self.actor_memory is None or self.critic_memory is None:
            return of_actor, of_critic
        assert start is not None, "a sequence has starts"
        layers = (self.actor_memory, self.critic_memory)
        states = (state["actor"], state["critic"])
        of_actor, of_critic = run(layers, states, (of_actor, of_critic), start)
        return output_of(of_actor), output_of(of_critic)

    def _apply_torso(self, torso: Callable[[Any], jax.Array], view: View, obs: Any) -> jax.Array:
        """Applies a torso, which sees a single batch axis, to any batch shape."""
        batch_shape = batch_shape_of(self.space, obs)
        ndim = len(batch_shape)
        size = math.prod(batch_shape)  # a batch may be empty, of which -1 says nothing
        flat = jax.tree.map(lambda x: x.reshape(size, *x.shape[ndim:]), view(obs))
        features = torso(flat)
        return features.reshape(*batch_shape, features.shape[-1])

    def _parametrize(self, features: jax.Array, obs: Any) -> Any:
        outputs = self.actor_out(features)
        if has_action_mask(self.space):
            # Before the head, so that samples, entropies and divergences all respect the mask.
            outputs = jnp.where(obs[ACTION_MASK], outputs, MASKED)
        log_std = None if self.head.log_std_shape is None else self.actor_log_std()
        return self.head.parametrize(outputs, log_std)

    def _value(self, features: jax.Array) -> jax.Array:
        return self.critic_out(features).squeeze(-1)


def _unmerged(obs: Any) -> Any:
    """Returns observations behind an optimisation barrier, except on a CPU.

    Without the barrier, XLA for GPUs merges the first layers of actor and critic to one product,
    and needs more kernels to add the biases and to separate the outputs.
    """
    return jax.lax.platform_dependent(
        obs, cpu=lambda obs: obs, default=jax.lax.optimization_barrier
    )


def has_action_mask(space: Space) -> bool:
    """Returns whether observations tell which actions are allowed."""
    return isinstance(space, Dict) and ACTION_MASK in space.names


def batch_shape_of(space: Space, obs: Any) -> tuple[int, ...]:
    """Returns the leading axes of an observation, those that its space does not have."""
    leaf, x = leaves(space)[0], jax.tree.leaves(obs)[0]
    return x.shape[: x.ndim - len(shape_of(leaf))]


class _LogStd(nn.Module):
    """The actor's log standard deviation.

    A separate module, so that the critic can be applied without the actor's parameters.
    """

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("value", nn.initializers.zeros_init(), self.shape)


def with_log_std(params: Any, log_std: Any) -> Any:
    """Returns parameters in which every entry of the log standard deviation is `log_std`."""
    own = jax.tree.map(lambda x: jnp.full_like(x, log_std), params["params"]["actor_log_std"])
    return {**params, "params": {**params["params"], "actor_log_std": own}}


def torso_biases(params: Any) -> dict[tuple[str, ...], jax.Array]:
    """Returns the biases of the torsos' layers, by their place in `params`."""
    return {
        path: x
        for path, x in flatten_dict(params).items()
        if path[1].endswith("_torso") and path[-1] == "bias"
    }


def with_biases(params: Any, biases: dict[tuple[str, ...], jax.Array]) -> Any:
    """Returns parameters with the given biases in their places."""
    return unflatten_dict(flatten_dict(params) | biases)


def split_params(params: Any) -> tuple[Any, Any]:
    """Splits parameters into those of the actor and of the critic, where they share none."""
    modules = params["params"]
    # Names of submodules are those of the fields of `ActorCritic`.
    critic = {name: value for name, value in modules.items() if name.startswith("critic_")}
    actor = {name: value for name, value in modules.items() if name not in critic}
    return {"params": actor}, {"params": critic}


def merge_params(actor: Any, critic: Any) -> Any:
    """Joins the parameters that `split_params` separated."""
    return {"params": {**actor["params"], **critic["params"]}}


def _hidden(
    x: jax.Array,
    size: int,
    dtype: Any,
    activation: Callable[[jax.Array], jax.Array] = lambda y: y,
    dot_general: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Adds a dense layer to the calling module, and returns its activated outputs `[..., size]`.

    Args:
      x: `[..., F]`.
      size: number of outputs.
      dtype: dtype of the product and the result; None for single precision.
      activation: function that is applied to the outputs.
      dot_general: replaces `jax.lax.dot_general` in single precision; ignored with a `dtype`.
    """
    if dtype is None:
        kernel_init = orthogonal("hidden_gain")
        return activation(nn.Dense(size, kernel_init=kernel_init, dot_general=dot_general)(x))
    return Dense(size, dtype, activation)(x)


def _product_with_patches(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Returns the product of patches `[B, height, width, F]` and a kernel.

    It has the arguments of `jax.lax.dot_general`, for flax. On a CPU the gradient of a large
    kernel is slow where F is a power of two: for 32 images and the first two layers of `nature_cnn`
    it takes 2.9 and 1.7 ms as one product, and 0.8 and 0.7 ms as a product of two halves of the
    images (jax 0.10.2).
    """

    def in_halves(x: jax.Array, kernel: jax.Array) -> jax.Array:
        halves = x.reshape(2, x.size // x.shape[-1] // 2, x.shape[-1])
        kernels = jnp.broadcast_to(kernel, (2, *kernel.shape))
        return jnp.matmul(halves, kernels).reshape(*x.shape[:-1], kernel.shape[-1])

    def whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, kernel, *args, **kwargs)

    size = kernel.shape[0]
    is_slow = size >= _LARGE_KERNEL and size & (size - 1) == 0
    # The batch of an exported policy may have any size.
    if not is_slow or not isinstance(x.shape[0], int) or x.shape[0] % 2:
        return whole(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=in_halves, default=whole)


_LARGE_KERNEL = 256


class Dense(nn.Module):
    """A dense layer with an activation, which stores only half-precision arrays for its derivative.

    The bias and the activation are computed in single precision. The parameters have the names and
    shapes of `flax.linen.Dense`.
    """

    size: int
    dtype: Any
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., F]` to `[..., size]` of `dtype`."""
        kernel = self.param("kernel", orthogonal("hidden_gain"), (x.shape[-1], self.size))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.size,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))  # without implicit broadcasting of ranks
        if self.activation in _DERIVATIVES:
            return _dense(self.activation, x, kernel, bias)
        y = jnp.matmul(x, kernel).astype(bias.dtype) + bias
        return self.activation(y).astype(self.dtype)


_DERIVATIVES: dict[Callable, Callable[[jax.Array], jax.Array]] = {
    nn.tanh: lambda y: 1.0 - y * y,
    nn.relu: lambda y: (y > 0.0).astype(y.dtype),
    nn.elu: lambda y: jnp.minimum(y, 0.0) + 1.0,
}
"""Derivatives of activations as functions of their values."""


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dense(
    activation: Callable[[jax.Array], jax.Array], x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    """Returns activation(x · kernel + bias) in the type of `x`.

    By JAX's own rules, either what precedes the activation or the cotangents of it would be stored
    in single precision, and XLA for GPUs would compute bias and activation outside the kernel of
    the product: on an H100 a minibatch of CartPole would move 6.6 instead of 6.1 GiB an update.
    """
    product = jnp.matmul(x, kernel, preferred_element_type=bias.dtype)
    return activation(product + bias).astype(x.dtype)


@_dense.defjvp
def _dense_jvp(
    activation: Callable[[jax.Array], jax.Array], primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
    x, kernel, bias = primals
    x_dot, kernel_dot, bias_dot = tangents
    y = _dense(activation, x, kernel, bias)
    # The products' cotangents are half precision; that of the bias, a sum, is single precision.
    product_dot = jnp.matmul(x_dot, kernel) + jnp.matmul(x, kernel_dot)
    slope = _DERIVATIVES[activation](y.astype(bias.dtype))
    return y, (slope * (product_dot.astype(bias.dtype) + bias_dot)).astype(y.dtype)
