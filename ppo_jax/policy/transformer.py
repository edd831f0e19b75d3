"""A gated transformer over sequences whose memory is cleared where episodes start.

GTrXL: Parisotto et al. 2019 (arXiv:1910.06764), section 3. Its attention has the relative positions
of Transformer-XL: Dai et al. 2019 (arXiv:1901.02860), section 3.3.

Axes: T steps, N environments, L layers, M steps of memory, D features, H heads of D / H features.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.policy.distributions import MASKED
from ppo_jax.policy.initializers import orthogonal

TransformerState = tuple[jax.Array, jax.Array, jax.Array]
"""The memory and the last output of a gated transformer; a plain tuple, for exported policies.

Inputs of each layer in the last M steps, the newest last, `[N, L, M, D]`; the number of these steps
that belong to the current episode, int32 `[N]`; and the output `[N, D]`.
"""


class GatedTransformer(nn.Module):
    """Layers of attention to the last steps of the episode, each with a gated residual.

    The memory keeps each layer's inputs as they were computed when the policy acted. They are
    constants in an update, also after the parameters have changed.
    """

    size: int
    window: int
    """M: every layer of a step sees the step itself and M before it."""
    num_layers: int
    num_heads: int

    def initial_state(self, batch_shape: tuple[int, ...]) -> TransformerState:
        """Returns the state at the start of an episode, an empty memory."""
        past = jnp.zeros((*batch_shape, self.num_layers, self.window, self.size), jnp.float32)
        output = jnp.zeros((*batch_shape, self.size), jnp.float32)
        return past, jnp.zeros(batch_shape, jnp.int32), output

    @nn.compact
    def __call__(self, state: TransformerState, x: jax.Array, start: jax.Array) -> TransformerState:
        """Returns the state after every step, `[T, N, ...]`.

        Args:
          state: before the first step, `[N, ...]`.
          x: inputs, `[T, N, F]`.
          start: `[T, N]`, the input is the first of an episode: it sees nothing before it.
        """
        past, age, _ = state
        num_steps = len(start)
        ages = _ages(age, start)
        visible = _visible(ages, self.window)
        x = nn.Dense(self.size, kernel_init=orthogonal(), name="embedding")(x)
        inputs = []
        for i in range(self.num_layers):
            inputs.append(jnp.concatenate([jnp.moveaxis(past[:, i], 1, 0), x]))
            x = _Layer(self.num_heads, name=f"layer_{i}")(inputs[-1], visible)
        # The memory after step t has the inputs of M steps up to t.
        steps = jnp.arange(1, num_steps + 1)[:, None] + jnp.arange(self.window)[None]
        pasts = jnp.stack(inputs, axis=2)[steps]  # [T, M, N, L, D]
        return pasts.transpose(0, 2, 3, 1, 4), jnp.minimum(ages + 1, self.window), x


class _Layer(nn.Module):
    """Attention and a two-layer MLP; each normalises its input and is followed by a gate."""

    num_heads: int

    @nn.compact
    def __call__(self, inputs: jax.Array, visible: jax.Array) -> jax.Array:
        """Returns outputs `[T, N, D]` of inputs `[M + T, N, D]`; for `visible` see `_visible`."""
        size = inputs.shape[-1]
        x = inputs[-len(visible) :]
        # Inputs that a step does not see have weight 0, but 0 times NaN would be NaN. A step whose
        # own input is not finite still has such an output, because `x` keeps that input.
        inputs = jnp.where(jnp.isfinite(inputs), inputs, 0.0)
        attended = _Attention(self.num_heads, name="attention")(
            nn.LayerNorm(name="attention_norm")(inputs), visible
        )
        x = _Gate(name="attention_gate")(x, nn.relu(attended))
        hidden = nn.LayerNorm(name="dense_norm")(x)
        hidden = nn.relu(nn.Dense(4 * size, kernel_init=orthogonal(), name="dense_0")(hidden))
        hidden = nn.Dense(size, kernel_init=orthogonal(), name="dense_1")(hidden)
        return _Gate(name="dense_gate")(x, nn.relu(hidden))


class _Attention(nn.Module):
    """Multi-head attention with the relative positions of Transformer-XL."""

    num_heads: int

    @nn.compact
    def __call__(self, inputs: jax.Array, visible: jax.Array) -> jax.Array:
        """Returns what each step attends to, `[T, N, D]`.

        Args:
          inputs: normalised inputs of the layer, `[M + T, N, D]`.
          visible: see `_visible`.
        """
        size = inputs.shape[-1]
        num_steps = len(visible)
        window = len(inputs) - num_steps
        heads = (self.num_heads, size // self.num_heads)

        def kernel(name: str) -> jax.Array:
            return self.param(name, orthogonal(), (size, size))

        def by_head(name: str) -> jax.Array:
            return kernel(name).reshape(size, *heads)

        def bias(name: str) -> jax.Array:
            zeros = nn.initializers.zeros_init()
            return self.param(name, zeros, heads, jnp.float32)[None, None]

        query = jnp.einsum("tnd,dhk->tnhk", inputs[window:], by_head("query"))
        key_kernel, value_kernel = by_head("key"), by_head("value")
        by_content, by_position = query + bias("content_bias"), query + bias("position_bias")
        positions = jnp.einsum("md,dhk->mhk", _positions(window, size), by_head("position"))
        scores = _shifted(jnp.einsum("tnhk,mhk->nhtm", by_position, positions), num_steps)
        if num_steps == 1:
            # One step multiplies its query, and what it attends to, by the kernels. A remembered
            # step then takes H·D products; multiplying its input by a kernel would take D².
            by_input = jnp.einsum("tnhk,dhk->tnhd", by_content, key_kernel)
            scores += jnp.einsum("tnhd,snd->nhts", by_input, inputs)
        else:
            keys = jnp.einsum("snd,dhk->snhk", inputs, key_kernel)
            scores += jnp.einsum("tnhk,snhk->nhts", by_content, keys)
        scores = jnp.where(
            visible.transpose(1, 0, 2)[:, None], scores / math.sqrt(heads[1]), MASKED
        )
        weights = nn.softmax(scores)
        if num_steps == 1:
            mixture = jnp.einsum("nhts,snd->tnhd", weights, inputs)
            attended = jnp.einsum("tnhd,dhk->tnhk", mixture, value_kernel)
        else:
            values = jnp.einsum("snd,dhk->snhk", inputs, value_kernel)
            attended = jnp.einsum("nhts,snhk->tnhk", weights, values)
        return jnp.matmul(attended.reshape(*attended.shape[:2], size), kernel("output"))


class _Gate(nn.Module):
    """The gated recurrent unit in place of a residual sum: Parisotto et al. 2019, section 3.2."""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Returns `x` moved towards a function of `x` and `y`, both `[T, N, D]`."""

        def product(name: str, z: jax.Array) -> jax.Array:
            dense = nn.Dense(z.shape[-1], use_bias=False, kernel_init=orthogonal(), name=name)
            return dense(z)

        # A layer starts near the identity, so that a policy learns to react before it remembers.
        start = nn.initializers.constant(2.0)
        bias = self.param("bias", start, x.shape[-1:], jnp.float32)[None, None]
        reset = nn.sigmoid(product("reset_y", y) + product("reset_x", x))
        update = nn.sigmoid(product("update_y", y) + product("update_x", x) - bias)
        candidate = jnp.tanh(product("candidate_y", y) + product("candidate_x", reset * x))
        return (1.0 - update) * x + update * candidate


def _ages(age: jax.Array, start: jax.Array) -> jax.Array:
    """Returns how many steps of its episode precede each step, `[T, N]`; of the first, `age`."""
    if len(start) == 1:
        return jnp.where(start, 0, age[None])
    steps = jnp.arange(len(start), dtype=age.dtype)[:, None]
    last_start = jax.lax.cummax(jnp.where(start, steps, -1), axis=0)
    return jnp.where(last_start < 0, age[None] + steps, steps - last_start)


def _visible(ages: jax.Array, window: int) -> jax.Array:
    """Returns which inputs each step sees, `[T, N, M + T]`: those of its episode and the window."""
    num_steps = len(ages)
    slots = jnp.arange(window + num_steps)[None]
    distance = jnp.arange(num_steps)[:, None] + window - slots  # [T, M + T], in steps
    is_near = (distance >= 0) & (distance <= window)
    return is_near[:, None] & (distance[:, None] <= ages[..., None])


def _positions(window: int, size: int) -> jax.Array:
    """Returns sines and cosines of the distances M, …, 0, `[M + 1, D]`.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    """
    rates = 10_000.0 ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angles = jnp.arange(window, -1, -1, dtype=jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :size]


def _shifted(scores: jax.Array, num_steps: int) -> jax.Array:
    """Returns scores by distance, `[N, H, T, M + 1]`, as scores by input, `[N, H, T, M + T]`.

    Row t moves t places to the right: rows that are padded by T entries are read as rows that are
    one entry shorter (Dai et al. 2019, appendix B).
    """
    *batch, _, width = scores.shape
    padded = jnp.pad(scores, ((0, 0),) * (scores.ndim - 1) + ((0, num_steps),))
    flat = padded.reshape(*batch, num_steps * (width + num_steps))
    length = width + num_steps - 1
    return flat[..., : num_steps * length].reshape(*batch, num_steps, length)
