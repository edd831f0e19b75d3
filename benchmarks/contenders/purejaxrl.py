"""PureJaxRL, from the checkout that PUREJAXRL names.

Its network for continuous actions has 256 units a layer and cannot be changed. Actor and critic
share the GRU of 128 units that `ppo_rnn.py` has. Weights are
initialised by scaled Gaussians, because several QR decompositions of an orthogonal initialisation
under one vmap can wait for each other forever on a CPU with two threads (jaxlib 0.10.2).
"""

import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import flax.linen
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from jax_timing import compile_and_time
from serving import serve


def import_ppo(*, continuous: bool, recurrent: bool) -> Any:
    """Imports the module for discrete actions, for continuous ones, or with a GRU.

    Its wrappers import two suites of environments that these workloads do not use. Empty modules
    replace them.
    """
    training = "brax.envs.wrappers.training"
    for name in ("brax", "brax.envs", "brax.envs.wrappers", training, "navix"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["brax"])["envs"] = sys.modules["brax.envs"]
    vars(sys.modules[training]).update(EpisodeWrapper=object, AutoResetWrapper=object)
    flax.linen.initializers.orthogonal = scaled_gaussian
    sys.path.insert(0, str(Path(os.environ["PUREJAXRL"]) / "purejaxrl"))
    if recurrent:
        ppo = importlib.import_module("ppo_rnn")
        # It calls the cells of flax as flax 0.6 had them.
        ppo.ScannedRNN.initialize_carry = staticmethod(lambda *shape: jnp.zeros(shape))
        flax.linen.GRUCell = functools.partial(flax.linen.GRUCell, features=128)
        return ppo
    if not continuous:
        return importlib.import_module("ppo")
    ppo = importlib.import_module("ppo_continuous_action")
    ppo.BraxGymnaxWrapper = WithDefaults
    return ppo


def scaled_gaussian(gain: float) -> Any:
    """Returns an initialiser with the variance of the entries of an orthogonal matrix."""
    return jax.nn.initializers.variance_scaling(gain**2, "fan_avg", "normal")


class WithDefaults:
    """An environment of gymnax whose spaces take None for the default parameters."""

    def __init__(self, name: str) -> None:
        self._env, self._params = gymnax.make(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def action_space(self, params: Any) -> Any:
        """Returns the space of actions; `params` is None."""
        return self._env.action_space(params or self._params)

    def observation_space(self, params: Any) -> Any:
        """Returns the space of observations; `params` is None."""
        return self._env.observation_space(params or self._params)


def build(workload: dict[str, Any]) -> Any:
    """Compiles its `make_train`: `ppo.py`, `ppo_rnn.py`, or `ppo_continuous_action.py`."""
    hparams = workload["hparams"]
    config = {
        "LR": hparams["learning_rate"],
        "NUM_ENVS": workload["num_envs"],
        "NUM_STEPS": workload["num_steps"],
        "TOTAL_TIMESTEPS": workload["total_timesteps"],
        "UPDATE_EPOCHS": workload["num_epochs"],
        "NUM_MINIBATCHES": workload["num_minibatches"],
        "GAMMA": hparams["gamma"],
        "GAE_LAMBDA": hparams["gae_lambda"],
        "CLIP_EPS": hparams["clip_eps"],
        "ENT_COEF": hparams["ent_coef"],
        "VF_COEF": hparams["vf_coef"],
        "MAX_GRAD_NORM": hparams["max_grad_norm"],
        "ACTIVATION": "tanh",
        "ENV_NAME": workload["env"],
        "ANNEAL_LR": False,
        "NORMALIZE_ENV": False,
        "DEBUG": False,
    }
    recurrent = workload["memory"] == "gru"
    ppo = import_ppo(continuous=workload["continuous"], recurrent=recurrent)

    def returns_of(result: Any) -> Any:
        info = result["metric" if recurrent else "metrics"]
        returns = np.asarray(info["returned_episode_returns"])[..., -1, :, :]
        return np.where(np.asarray(info["returned_episode"])[..., -1, :, :], returns, np.nan)

    return compile_and_time(ppo.make_train(config), returns_of, workload["num_seeds"])


if __name__ == "__main__":
    serve(build)
