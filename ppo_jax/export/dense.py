"""Policies of dense layers as plain arrays, for formats that have code of their own."""

from typing import NamedTuple

import jax
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.envs.spaces import Box, Leaf
from ppo_jax.errors import ConfigError
from ppo_jax.ops import running_stats
from ppo_jax.policy.networks import is_image
from ppo_jax.policy.policy import Policy

HEADS = ("gaussian", "tanh_gaussian", "beta")


class DensePolicy(NamedTuple):
    """A greedy policy of dense layers."""

    space: Leaf
    """Space of observations, which are a single array."""
    action_space: Leaf
    arrays: dict[str, np.ndarray]
    """`kernel_0 [F, H]`, `bias_0 [H]`, … of hidden layers, `kernel_out`, `bias_out`; with layer
    normalisation `scale_0`, `offset_0`, …; with normalised observations `mean` and `std`; `low` and
    `high` of continuous actions with bounds."""
    num_layers: int
    """Hidden layers."""
    activation: str
    has_layer_norm: bool
    is_normalized: bool
    input_scale: float
    """Observations are divided by this: 255 for bytes of images."""
    head: str
    """"categorical", or one of `HEADS`."""
    has_std_outputs: bool
    """The second half of the outputs are log standard deviations."""


def dense_policy(policy: Policy) -> DensePolicy:
    """Returns the layers of a policy.

    Raises:
      ConfigError: the policy has other parts than dense layers.
    """
    spec = policy.spec
    space = spec.observation_space
    reasons = {
        "a memory": spec.memory is not None,
        f"the network {spec.network}": spec.network != "mlp",
        "observations of several arrays": isinstance(space, (spaces.Dict, spaces.Tuple)),
        "embeddings": spec.embedding_size is not None,
    }
    head = "categorical"
    if isinstance(spec.action_space, Box):
        head = spec.action_distribution or "gaussian"
        reasons[f"the action distribution {head}"] = head not in HEADS
    for what, is_so in reasons.items():
        if is_so:
            raise ConfigError(
                "this format takes policies of dense layers and a single array of observations; "
                f"the policy has {what}. Use stablehlo or onnx."
            )
    assert isinstance(space, Leaf)
    # Names of flax's modules, in the order in which they are called.
    params = jax.device_get(policy.params)["params"]
    torso = params.get("actor_torso", {}).get("MLP_0", {})  # absent without hidden layers
    arrays: dict[str, np.ndarray] = {}
    for i in range(len(spec.hidden_sizes)):
        layer = torso[f"Dense_{i}"]
        arrays |= {f"kernel_{i}": layer["kernel"], f"bias_{i}": layer["bias"]}
        if spec.layer_norm:
            norm = torso[f"LayerNorm_{i}"]
            arrays |= {f"scale_{i}": norm["scale"], f"offset_{i}": norm["bias"]}
    out = params["actor_out"]
    arrays |= {"kernel_out": out["kernel"], "bias_out": out["bias"]}
    actions = spec.action_space
    if isinstance(actions, Box) and actions.low is not None:
        arrays |= {"low": np.array(actions.low), "high": np.array(actions.high)}
    stats = None if policy.obs_stats is None else policy.obs_stats[0]
    # Without samples, observations are left as they are.
    is_normalized = stats is not None and bool(stats.num_samples > 0)
    if stats is not None and is_normalized:
        std = np.sqrt(np.asarray(stats.var) + running_stats.EPS)
        arrays |= {"mean": np.ravel(stats.mean), "std": np.ravel(std)}
    # As in `networks.Torso`.
    is_bytes = isinstance(space, Box) and is_image(space) and space.dtype == "uint8"
    return DensePolicy(
        space=space,
        action_space=spec.action_space,
        arrays={name: np.asarray(x, np.float32) for name, x in arrays.items()},
        num_layers=len(spec.hidden_sizes),
        activation=spec.activation,
        has_layer_norm=spec.layer_norm,
        is_normalized=is_normalized,
        input_scale=255.0 if is_bytes else 1.0,
        head=head,
        has_std_outputs=spec.state_dependent_std or head == "beta",
    )
