"""Tuned settings for known environments, from which `ppo-jax train ENV` starts.

`python benchmarks/presets.py` and `python benchmarks/algorithms.py` measure the returns they reach.
Tasks of Brax and MuJoCo Playground that were not tuned here use the settings in `published`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_jax import published
from ppo_jax.config import SETTINGS_OF_LAYERS, Config, module_of
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams


class _Preset(NamedTuple):
    config: dict[str, Any]
    hparams: dict[str, float]


# CartPole: the three REINFORCE variants need three times as much data as the other algorithms.
_EPISODES = {"num_envs": 16, "num_steps": 500, "total_timesteps": 1_600_000}
_ROLLOUTS = {"num_envs": 8, "num_steps": 128, "total_timesteps": 500_000}
# Clipping the value keeps the critic's gradient from dominating the joint norm.
_CLIPPED_VALUE = {"learning_rate": 1e-3, "value_clip_eps": 0.2}

_PENDULUM = {
    "num_envs": 8,
    "num_steps": 128,
    "num_epochs": 10,
    "num_minibatches": 16,
    "total_timesteps": 800_000,
}
_PENDULUM_HPARAMS = {
    "learning_rate": 1e-3,
    "gamma": 0.95,
    "ent_coef": 0.0,
    "max_grad_norm": 10.0,
}

# Normalised rewards make a distant goal worth exploring for. Observations of the two mountain cars
# differ in size by a factor of a hundred.
_NORMALIZED = {
    "num_envs": 32,
    "num_steps": 128,
    "num_minibatches": 8,
    "normalize_obs": True,
    "normalize_reward": True,
}
_SHORT = {"num_envs": 16, "num_steps": 64, "total_timesteps": 200_000}
_FAST = {**_CLIPPED_VALUE, "learning_rate": 2e-3}

# Without layer normalisation these networks stop at 7 to 12 points of Breakout, with it they reach
# 40.
_MINATAR = _Preset(
    {
        "num_envs": 64,
        "num_steps": 128,
        "num_minibatches": 8,
        "activation": "relu",
        "layer_norm": True,
        "total_timesteps": 10_000_000,
    },
    _CLIPPED_VALUE,
)

# Enemies appear unpredictably, so that long returns are noisy: with λ = 0.95 Asterix reaches 5 in
# three million steps and Seaquest 7 in two million, with λ = 0.6 they reach 11 and 14.
_MINATAR_SHORT = _Preset(
    {**_MINATAR.config, "separate_grad_norms": True}, {**_MINATAR.hparams, "gae_lambda": 0.6}
)

# Tasks of suites: a few minutes on two cores.
_GRID = _Preset(
    {"num_envs": 32, "num_steps": 128, "num_minibatches": 8, "total_timesteps": 500_000},
    _CLIPPED_VALUE,
)
_LONG_GRID = _Preset({**_GRID.config, "total_timesteps": 1_000_000}, _GRID.hparams)
_BOARD = _Preset({**_GRID.config, "num_envs": 64, "num_steps": 64}, _CLIPPED_VALUE)

# Schulman et al. 2017 (arXiv:1707.06347), table 5, with the network of Mnih et al. 2015 and four
# epochs, as CleanRL and Stable-Baselines3 train Atari games.
_ATARI = _Preset(
    {
        "num_envs": 8,
        "num_steps": 128,
        "num_epochs": 4,
        "num_minibatches": 4,
        "network": "nature_cnn",
        "hidden_sizes": (512,),
        "activation": "relu",
        "shared_torso": True,
        "total_timesteps": 10_000_000,
    },
    {"learning_rate": 2.5e-4, "clip_eps": 0.1, "value_clip_eps": 0.1},
)
_ENVPOOL_ATARI = _Preset(
    {**_ATARI.config, "env_kwargs": {"episodic_life": True, "reward_clip": True}}, _ATARI.hparams
)

_PRESETS: dict[str, dict[str, _Preset]] = {
    "CartPole-v1": {
        "reinforce": _Preset(_EPISODES, {"learning_rate": 2e-3}),
        "reinforce_to_go": _Preset(_EPISODES, {"learning_rate": 2e-3}),
        "reinforce_baseline": _Preset(
            _EPISODES, {"learning_rate": 4e-3, "critic_learning_rate": 3e-3}
        ),
        "actor_critic": _Preset(
            {"num_envs": 16, "num_steps": 8, "total_timesteps": 500_000},
            {"learning_rate": 3e-3, "gae_lambda": 0.95},
        ),
        "off_policy_pg": _Preset(_ROLLOUTS, _CLIPPED_VALUE),
        "trpo": _Preset(
            {"num_envs": 16, "num_steps": 128, "num_minibatches": 8, "total_timesteps": 500_000},
            {"critic_learning_rate": 3e-3},
        ),
        "ppo_penalty": _Preset(_ROLLOUTS, _CLIPPED_VALUE),
        "ppo_adaptive": _Preset(_ROLLOUTS, {**_CLIPPED_VALUE, "learning_rate": 2.5e-3}),
        "ppo": _Preset(_ROLLOUTS, _CLIPPED_VALUE),
        "spo": _Preset(_ROLLOUTS, _CLIPPED_VALUE),
        "dpo": _Preset(_ROLLOUTS, _CLIPPED_VALUE),
    },
    "Acrobot-v1": {
        "ppo": _Preset(
            {"num_envs": 16, "num_steps": 128, "total_timesteps": 500_000},
            {"learning_rate": 3e-3, "gae_lambda": 0.9, "ent_coef": 0.0},
        ),
    },
    "Pendulum-v1": {
        # Each update moves the policy by the whole bound, whatever the noise: it needs more data.
        "trpo": _Preset(
            {**_PENDULUM, "num_envs": 32, "num_steps": 200, "num_minibatches": 32},
            {"gamma": 0.95},
        ),
        "ppo_penalty": _Preset(_PENDULUM, {**_PENDULUM_HPARAMS, "kl_coef": 3.0}),
        "ppo_adaptive": _Preset(_PENDULUM, _PENDULUM_HPARAMS),
        # Rewards down to −16 a step make values of hundreds, whose errors dominate the joint norm.
        "ppo": _Preset(
            {**_PENDULUM, "separate_grad_norms": True},
            {
                **_PENDULUM_HPARAMS,
                "learning_rate": 5e-4,
                "reward_scale": 0.1,
                "max_grad_norm": 0.5,
            },
        ),
        "spo": _Preset(_PENDULUM, _PENDULUM_HPARAMS),
        "dpo": _Preset(_PENDULUM, _PENDULUM_HPARAMS),
    },
    "MountainCar-v0": {
        "ppo": _Preset(
            {**_NORMALIZED, "total_timesteps": 1_500_000},
            {"learning_rate": 2e-3, "gamma": 0.995},
        ),
    },
    "MountainCarContinuous-v0": {
        "ppo": _Preset(
            {**_NORMALIZED, "total_timesteps": 1_000_000},
            {"learning_rate": 1e-3, "gamma": 0.999},
        ),
    },
    "Catch-bsuite": {"ppo": _Preset(_SHORT, _FAST)},
    "DeepSea-bsuite": {
        "ppo": _Preset(
            {"num_envs": 64, "num_steps": 64, "total_timesteps": 1_000_000},
            {**_CLIPPED_VALUE, "ent_coef": 0.03},
        ),
    },
    "DiscountingChain-bsuite": {
        "ppo": _Preset(
            {**_SHORT, "num_steps": 128},
            {"learning_rate": 1e-3, "gamma": 1.0, "gae_lambda": 1.0, "ent_coef": 0.03},
        ),
    },
    "MemoryChain-bsuite": {
        "ppo": _Preset(
            {
                "env_params": {"memory_length": 20},
                "memory": "gru",
                "memory_size": 64,
                "num_envs": 64,
                "num_steps": 64,
                "total_timesteps": 500_000,
            },
            _CLIPPED_VALUE,
        ),
    },
    "CartPole-v1-positions": {
        "ppo": _Preset(
            {
                "memory": "gru",
                "memory_size": 32,
                "hidden_sizes": (32,),
                "num_envs": 16,
                "num_steps": 128,
                "total_timesteps": 500_000,
            },
            _FAST,
        ),
    },
    "UmbrellaChain-bsuite": {"ppo": _Preset(_SHORT, _FAST)},
    "FourRooms-misc": {
        "ppo": _Preset(
            {"num_envs": 32, "num_steps": 128, "total_timesteps": 500_000}, _CLIPPED_VALUE
        ),
    },
    "Asterix-MinAtar": {"ppo": _MINATAR_SHORT},
    "Breakout-MinAtar": {"ppo": _MINATAR},
    "Freeway-MinAtar": {"ppo": _MINATAR},
    "Seaquest-MinAtar": {"ppo": _MINATAR_SHORT},
    "SpaceInvaders-MinAtar": {"ppo": _MINATAR},
    "craftax:Craftax-Classic-Symbolic-v1": {
        # Craftax_Baselines has 1,024 environments, two layers of 512 and a rate of 2e-4, for a GPU.
        # Some 30 episodes end in an update of 4,096 steps.
        "ppo": _Preset(
            {
                "num_envs": 64,
                "num_steps": 64,
                "num_minibatches": 8,
                "hidden_sizes": (256, 256),
                "reset_pool": 32,
                "total_timesteps": 1_000_000,
            },
            {"learning_rate": 5e-4, "gae_lambda": 0.8, "max_grad_norm": 1.0},
        ),
    },
    "jaxmarl:MPE_simple_spread_v3": {
        "ppo": _Preset(
            {
                "num_envs": 96,  # 32 games of three agents
                "num_steps": 64,
                "num_minibatches": 8,
                "total_timesteps": 2_000_000,
            },
            {**_CLIPPED_VALUE, "gamma": 0.95},
        ),
    },
    "jaxtari:pong": {
        # Objects, not pictures. A game to 21 points takes fewer than 5,000 actions of four frames.
        "ppo": _Preset(
            {
                **_GRID.config,
                "num_envs": 64,
                "normalize_obs": True,
                "wrappers": {"action_repeat": 4, "time_limit": 5_000},
                "total_timesteps": 4_000_000,
            },
            _CLIPPED_VALUE,
        ),
    },
    "jumanji:Snake-v1": {"ppo": _LONG_GRID},
    "navix:Navix-Empty-Random-6x6-v0": {"ppo": _GRID},
    "navix:Navix-DoorKey-5x5-v0": {"ppo": _LONG_GRID},
    "octax:wipe_off": {
        "ppo": _Preset(
            {**_BOARD.config, "activation": "relu", "total_timesteps": 200_000},
            {**_BOARD.hparams, "gamma": 0.97},
        ),
    },
    "pgx:tic_tac_toe": {"ppo": _BOARD},
    "pgx:connect_four": {
        "ppo": _Preset({**_BOARD.config, "total_timesteps": 1_000_000}, _BOARD.hparams)
    },
    "playground:CartpoleBalance": {
        "ppo": _Preset(
            {
                "num_envs": 64,
                "num_steps": 64,
                "num_minibatches": 16,
                "num_epochs": 8,
                "normalize_obs": True,
                "total_timesteps": 300_000,
            },
            {"learning_rate": 1e-3, "reward_scale": 0.1},
        ),
    },
    "xminigrid:MiniGrid-Empty-8x8": {"ppo": _GRID},
    "xminigrid:MiniGrid-DoorKey-5x5": {"ppo": _LONG_GRID},
}

_ON_HOST: dict[str, dict[str, _Preset]] = {
    "ale": {
        "ppo": _Preset({**_ATARI.config, "env_kwargs": {"life_loss_info": True}}, _ATARI.hparams)
    },
    "envpool:Breakout-v5": {"ppo": _ENVPOOL_ATARI},
    "envpool:Pong-v5": {"ppo": _ENVPOOL_ATARI},
}
"""Presets of environments on the host, or of all those of a suite."""

_ARGUMENTS = ("env_kwargs", "env_params")
_DEFAULTS = vars(Config())


def preset(env: str, algorithm: str = "ppo", **changes: Any) -> tuple[Config, HParams]:
    """Returns the preset of `algorithm` in `env`, or the defaults where there is none.

    Args:
      env: an environment's name.
      algorithm: an algorithm's name.
      **changes: fields of `Config` that replace those of the preset; entries of `env_kwargs` and
        `env_params` are merged into the preset's.

    Returns:
      `(config, hparams)`, as `ppo_jax.train` and `trainer.run` take them.

    >>> config, hparams = preset("CartPole-v1", num_envs=16)
    >>> config.num_envs
    16
    """
    wrong = [name for name in changes if name in HParams.names()]
    if wrong:
        raise ConfigError(
            f"changes of a preset must be settings of Config; {wrong[0]} is a hyperparameter. Use "
            f"hparams.replace({wrong[0]}=…) with the preset's second record."
        )
    start = _presets_of(env).get(algorithm, _Preset({}, {}))
    settings = {**start.config, **with_arguments(start.config, changes)}
    config = Config(env=env, algorithm=algorithm).replace(**settings)
    return config, HParams(**start.hparams)


def with_arguments(start: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `changes`, with `env_kwargs` and `env_params` merged into those of `start`.

    If `changes` names a user's network, settings of `start` that shape the package's own layers
    return to their defaults, unless `changes` has another value.

    >>> with_arguments({"env_params": {"gravity": 9.8}}, {"env_params": {"length": 1.0}})
    {'env_params': {'gravity': 9.8, 'length': 1.0}}
    """
    result = dict(changes)
    if module_of(changes.get("network", "mlp")) is not None:
        # A user's module takes the place of the layers that these settings shape.
        for name in SETTINGS_OF_LAYERS:
            if name in start and changes.get(name, start[name]) == start[name]:
                result[name] = _DEFAULTS[name]
    for name in _ARGUMENTS:
        # Anything else is refused where it is checked, by `Config`.
        if isinstance(changes.get(name), (Mapping, tuple)):
            result[name] = {**dict(start.get(name, ())), **dict(changes[name])}
    return result


def names() -> tuple[str, ...]:
    """Returns the names of the environments in JAX with a preset that was tuned here."""
    return tuple(_PRESETS)


def algorithms(env: str) -> tuple[str, ...]:
    """Returns the names of the algorithms that have a preset for `env`."""
    return tuple(_presets_of(env))


def _presets_of(env: str) -> dict[str, _Preset]:
    """Returns the presets of an environment, or of its suite, by algorithm."""
    presets = _PRESETS | _ON_HOST
    if env in presets:
        return presets[env]
    if env in published.BRAX_ARGUMENTS:
        config, hparams = published.from_brax(published.BRAX_ARGUMENTS[env])
        if env.startswith("brax:"):
            config["env_kwargs"] = {"backend": "positional"}  # the notebook's engine
        return {"ppo": _Preset(config, hparams)}
    return presets.get(env.partition(":")[0], {})
