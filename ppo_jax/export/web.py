"""A policy that plays CartPole in a page of plain JavaScript."""

import json
import string
from importlib import resources
from typing import Any

import jax
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.errors import ConfigError
from ppo_jax.export.dense import dense_policy
from ppo_jax.ops.running_stats import CLIP
from ppo_jax.policy.policy import Policy

_NUM_EXAMPLES = 32


def to_page(policy: Policy) -> bytes:
    """Returns a page that needs nothing else, in which the policy balances the pole.

    The page plays episodes when it is opened, and compares its network with the policy; the results
    are in `document.body.dataset.meanReturn` and `.difference`.

    Raises:
      ConfigError: the policy is not one for CartPole, or has other parts than dense layers.
    """
    spec = policy.spec
    is_cartpole = spec.action_space == spaces.Discrete(2) and (
        isinstance(spec.observation_space, spaces.Box) and spec.observation_space.shape == (4,)
    )
    if not is_cartpole:
        raise ConfigError(
            "the page plays CartPole-v1, with 4 numbers and 2 actions; the policy is for "
            f"{spec.observation_space} and {spec.action_space}. Use another format."
        )
    dense = dense_policy(policy)
    # Larger than states of the game, so that clips and saturated activations are compared as well.
    obs = np.random.default_rng(0).normal(size=(_NUM_EXAMPLES, 4)).astype(np.float32)
    expected = jax.device_get(policy.action_params(obs))
    record: dict[str, Any] = {
        "arrays": {name: x.tolist() for name, x in dense.arrays.items()},
        "numLayers": dense.num_layers,
        "activation": dense.activation,
        "hasLayerNorm": dense.has_layer_norm,
        "isNormalized": dense.is_normalized,
        "examples": [
            {"obs": x.tolist(), "logits": z.tolist()} for x, z in zip(obs, expected, strict=True)
        ],
    }
    template = resources.files("ppo_jax.export").joinpath("cartpole.html").read_text("utf-8")
    page = string.Template(template).substitute(policy=json.dumps(record), clip=f"{CLIP:g}")
    return page.encode()
