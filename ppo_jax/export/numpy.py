"""A policy of dense layers as NumPy arrays and a module of about thirty lines."""

import io
import textwrap

import numpy as np

import ppo_jax
from ppo_jax.envs.spaces import Box, Discrete, MultiDiscrete
from ppo_jax.export.dense import DensePolicy, dense_policy
from ppo_jax.ops.running_stats import CLIP
from ppo_jax.policy.policy import Policy

ACTIVATIONS = {
    "tanh": "np.tanh(x)",
    "relu": "np.maximum(x, 0)",
    "elu": "np.where(x > 0, x, np.expm1(np.minimum(x, 0)))",
    "gelu": "x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))",
    "silu": "x / (1 + np.exp(-x))",
}
_LAYER_NORM_EPS = 1e-6  # flax's default


def to_numpy(policy: Policy) -> dict[str, bytes]:
    """Returns the files `policy.npz` and `policy.py`, which need NumPy and no more.

    The module has `policy(obs) -> actions` and `outputs(obs)`, the last layer's outputs: logits, or
    what a head for continuous actions takes. Both take any batch axes.

    Raises:
      ConfigError: the policy has other parts than dense layers.
    """
    dense = dense_policy(policy)
    # Plain arrays alone: the file is read without pickle.
    content = io.BytesIO()
    np.savez(content, **dense.arrays)  # type: ignore[arg-type]  # its stubs say allow_pickle
    return {"policy.npz": content.getvalue(), "policy.py": _module(dense).encode()}


def _module(dense: DensePolicy) -> str:
    """Returns the code of the module."""
    return f'''\
"""A greedy policy, exported by ppo_jax {ppo_jax.__version__}. It needs NumPy alone."""

from pathlib import Path

import numpy as np

_PARAMS = dict(np.load(Path(__file__).with_name("policy.npz")))


def outputs(obs):
    """Returns the outputs of the last layer [..., {dense.arrays["bias_out"].size}]."""
{textwrap.indent(_forward(dense), "    ")}


def policy(obs):
    """Returns actions for observations [..., *observation shape]."""
    x = outputs(obs)
{textwrap.indent(_action(dense), "    ")}
'''


def _forward(dense: DensePolicy) -> str:
    """Returns the lines that compute the outputs of the last layer."""
    # Only the lines that this policy needs: the module can be read in one sitting.
    lines = [_input(dense)]
    if dense.is_normalized:
        clipped = f"-{CLIP:g}, {CLIP:g}"
        lines.append(f'x = np.clip((x - _PARAMS["mean"]) / _PARAMS["std"], {clipped})')
    lines += [
        f"for i in range({dense.num_layers}):",
        '    x = x @ _PARAMS[f"kernel_{i}"] + _PARAMS[f"bias_{i}"]',
    ]
    if dense.has_layer_norm:
        lines += [
            "    x = x - x.mean(-1, keepdims=True)",
            f"    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + {_LAYER_NORM_EPS})",
            '    x = x * _PARAMS[f"scale_{i}"] + _PARAMS[f"offset_{i}"]',
        ]
    lines += [
        f"    x = {ACTIVATIONS[dense.activation]}",
        'return x @ _PARAMS["kernel_out"] + _PARAMS["bias_out"]',
    ]
    return "\n".join(lines)


def _input(dense: DensePolicy) -> str:
    """Returns the lines that turn observations into features `[..., F]`."""
    space = dense.space
    if isinstance(space, Discrete):
        return f"x = np.eye({space.num_values}, dtype=np.float32)[np.asarray(obs)]"
    if isinstance(space, MultiDiscrete):
        return (
            "obs = np.asarray(obs)\n"
            f"parts = [np.eye(n, dtype=np.float32)[obs[..., i]] for i, n in "
            f"enumerate({space.num_values})]\n"
            "x = np.concatenate(parts, -1)"
        )
    size, ndim = int(np.prod(space.shape)), len(space.shape)
    scale = "" if dense.input_scale == 1 else f" / {dense.input_scale:g}"
    lines = f"x = np.asarray(obs, np.float32){scale}"
    if ndim == 1:
        return lines
    return f"{lines}\nx = x.reshape(*x.shape[: x.ndim - {ndim}], {size})"


def _action(dense: DensePolicy) -> str:
    """Returns the lines that turn outputs into the most likely action."""
    space = dense.action_space
    if isinstance(space, Discrete):
        return "return x.argmax(-1)"
    if isinstance(space, MultiDiscrete):
        ends = np.cumsum(space.num_values)[:-1].tolist()
        return (
            f"parts = np.split(x, {ends}, -1)\n"
            "return np.stack([part.argmax(-1) for part in parts], -1)"
        )
    assert isinstance(space, Box)
    lines = []
    if dense.has_std_outputs:
        half = dense.arrays["bias_out"].size // 2
        lines.append(f"x, y = x[..., :{half}], x[..., {half}:]")
    if space.low is not None:
        lines.append('low, high = _PARAMS["low"], _PARAMS["high"]')
    if dense.head == "tanh_gaussian":
        lines.append("x = low + (high - low) * (np.tanh(x) + 1) / 2")
    elif dense.head == "beta":
        # The mode (α − 1) / (α + β − 2) with α = 1 + softplus(x), β = 1 + softplus(y).
        lines += [
            "x, y = np.logaddexp(x, 0), np.logaddexp(y, 0)",
            "x = low + (high - low) * x / (x + y)",
        ]
    elif space.low is not None:
        lines.append("x = np.clip(x, low, high)")
    return "\n".join([*lines, f"return x.reshape(*x.shape[:-1], *{tuple(space.shape)})"])
