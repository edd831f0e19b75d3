"""Evaluation of policies in Gymnasium's environments, and comparison of those with gymnax's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppo_jax import envs
from ppo_jax.config import Config
from ppo_jax.errors import ConfigError, require_seed
from ppo_jax.evaluation import Evaluation
from ppo_jax.policy.policy import Policy
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.trained import load, summarize


class _Original(NamedTuple):
    """State variables of an environment, and the ranges from which compared states are drawn."""

    state: tuple[str, ...]
    """Entries of gymnax's state, in the order of Gymnasium's state vector."""
    low: tuple[float, ...]
    """Smallest values of states that are compared."""
    high: tuple[float, ...]
    """Largest values."""


_PI = np.pi
_ORIGINALS: Mapping[str, _Original] = {
    # States within an episode: packages differ in what they do after its end.
    "CartPole-v1": _Original(
        ("x", "x_dot", "theta", "theta_dot"), (-2.39, -3, -0.209, -3), (2.39, 3, 0.209, 3)
    ),
    "Acrobot-v1": _Original(
        ("joint_angle1", "joint_angle2", "velocity_1", "velocity_2"),
        (-_PI, -_PI, -4 * _PI, -9 * _PI),
        (_PI, _PI, 4 * _PI, 9 * _PI),
    ),
    "MountainCar-v0": _Original(("position", "velocity"), (-1.2, -0.07), (0.49, 0.07)),
    "MountainCarContinuous-v0": _Original(("position", "velocity"), (-1.2, -0.07), (0.44, 0.07)),
    "Pendulum-v1": _Original(("theta", "theta_dot"), (-_PI, -8), (_PI, 8)),
}
NAMES = tuple(_ORIGINALS)
"""Environments that both packages have."""
_TOLERANCE = 1e-3  # gymnax computes in float32 and Gymnasium in float64
_COMPARED_STATES = 2000


def require_same_environment(config: Config) -> None:
    """Raises a `ConfigError` unless Gymnasium has the environment of a config, unchanged."""
    if config.env not in NAMES:
        raise ConfigError(
            "an evaluation in Gymnasium (--gymnasium) needs an environment that it has as well, "
            f"{', '.join(NAMES)}; the run's is {config.env}. Leave gymnasium out."
        )
    for name in ("env_params", "env_kwargs", "wrappers"):
        if getattr(config, name):
            raise ConfigError(
                f"gymnasium needs the original environment; the run has {name} "
                f"{dict(getattr(config, name))}. Leave gymnasium out."
            )


def evaluate_in_gymnasium(
    policy: Policy, name: str, num_episodes: int, *, seed: int = 0, greedy: bool = True
) -> Evaluation:
    """Plays complete episodes in Gymnasium.

    Args:
      policy: the policy that acts.
      name: one of `NAMES`.
      num_episodes: E.
      seed: random seed of the actions; episode i is reset with `seed + i`.
      greedy: take the most likely actions instead of sampling.

    Returns:
      An `Evaluation` in NumPy.

    Raises:
      ConfigError: gymnasium is not installed.
    """
    games = [_make(name) for _ in range(num_episodes)]
    obs = np.stack([game.reset(seed=seed + i)[0] for i, game in enumerate(games)])
    act = jax.jit(policy.act)
    recurrent_state = policy.initial_recurrent_state((num_episodes,))
    returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, int)
    running = set(range(num_episodes))
    key = jax.random.key(seed)
    while running:
        key, action_key = jax.random.split(key)
        # All episodes act, also those that are over, so that one program is compiled.
        actions, recurrent_state = act(obs, recurrent_state, None if greedy else action_key)
        for i, action in enumerate(np.asarray(actions)):
            if i in running:
                obs[i], reward, terminated, truncated, _ = games[i].step(_fitting(action, games[i]))
                returns[i] += float(reward)
                lengths[i] += 1
                if terminated or truncated:
                    running.remove(i)
    finished = np.ones(num_episodes, bool)
    return Evaluation(returns, lengths, finished)  # type: ignore[arg-type]


def _make(name: str) -> Any:
    """Makes an environment of Gymnasium."""
    try:
        import gymnasium
    except ImportError as error:
        raise ConfigError(
            "gymnasium is not installed: pip install 'ppo-jax[gymnasium]'."
        ) from error
    return gymnasium.make(name)


def evaluate_run_in_gymnasium(
    run_dir: str | Path,
    *,
    seed: int = 0,
    num_episodes: int = 128,
    greedy: bool = True,
    best: bool = False,
    network: Any = None,
) -> dict[str, Any]:
    """Evaluates every policy of a run in Gymnasium; returns a summary as `summarize` does.

    Args:
      run_dir: directory that `train` wrote.
      seed: see `evaluate_in_gymnasium`.
      num_episodes: episodes for each seed of the run.
      greedy: take the most likely actions instead of sampling.
      best: the best policies while the run trained, instead of the last ones.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: there is no run, or Gymnasium does not have its environment.
    """
    directory = RunDirectory.open(run_dir)
    config, _ = directory.read_config(network)
    require_same_environment(config)
    require_seed(seed)
    found = directory.read_seeds()
    seeds = [found] if isinstance(found, int) else found
    results = [
        evaluate_in_gymnasium(
            load(run_dir, seed=number, best=best, network=network),
            config.env,
            num_episodes,
            seed=seed,
            greedy=greedy,
        )
        for number in seeds
    ]
    stacked = jax.tree.map(lambda *x: np.stack(x), *results)
    return summarize(stacked, seeds, greedy=greedy)


def _fitting(action: np.ndarray, game: Any) -> Any:
    """Returns an action as Gymnasium takes it, within the bounds of its space."""
    if action.ndim == 0:
        return int(action)
    return np.clip(action, game.action_space.low, game.action_space.high)


def differences(name: str) -> list[str]:
    """Returns a sentence for each quantity in which gymnax's environment differs from Gymnasium's.

    Both step from the same 2,000 states with the same actions, all drawn uniformly. Numbers are
    equal if they agree to 1e-3, because gymnax computes in float32.
    """
    original = _ORIGINALS[name]
    env, game = envs.make(name), _make(name)
    rng = np.random.default_rng(0)
    shape = (_COMPARED_STATES, len(original.state))
    states = rng.uniform(original.low, original.high, shape).astype(np.float32)
    game.action_space.seed(0)
    actions = np.array([game.action_space.sample() for _ in states])
    # One after another: Gymnasium's environments are Python objects.
    theirs = [_step(game, *pair) for pair in zip(states, actions, strict=True)]
    limit = game.spec.max_episode_steps
    game.close()
    _, template = env.reset(jax.random.key(0), env.params)

    def step(values: jax.Array, action: jax.Array) -> Any:
        state = template.replace(**dict(zip(original.state, values, strict=True)))
        return env.step(jax.random.key(0), state, action, env.params)

    ours = jax.device_get(jax.jit(jax.vmap(step))(states, actions))
    obs, rewards, terminated = map(np.array, zip(*theirs, strict=True))
    pairs = {
        "observation": (ours.obs, obs),
        "reward": (ours.reward, rewards),
        "termination": (ours.terminated, terminated),
    }
    sentences = []
    for what, (x, y) in pairs.items():
        # Relative for large numbers, such as the velocities of Acrobot.
        gap = np.abs(x.astype(float) - y) / (1 + np.abs(y))
        gap = gap.reshape(len(states), -1).max(axis=1)
        worst, count = int(gap.argmax()), int((gap > _TOLERANCE).sum())
        if count:
            sentences.append(
                f"the {what} after {count} of {len(gap)} states differs, such as after "
                f"{_shown(states[worst])} with the action {_shown(actions[worst])}: "
                f"{_shown(x[worst])} in gymnax, {_shown(y[worst])} in Gymnasium"
            )
    longest = env.longest_episode(env.params)
    if longest != limit:
        sentences.append(f"episodes have at most {longest} steps in gymnax, {limit} in Gymnasium")
    return sentences


def _step(game: Any, state: np.ndarray, action: Any) -> tuple[np.ndarray, float, bool]:
    """Steps Gymnasium's environment from any state."""
    inner = game.unwrapped
    inner.reset()  # forgets that an episode was over
    inner.state = state.astype(float)
    obs, reward, terminated, *_ = inner.step(action)
    return obs, float(reward), terminated


def _shown(value: Any) -> str:
    return np.array2string(np.asarray(value), precision=4, separator=", ")


def comparison(name: str) -> str:
    """Returns how gymnax's environment compares with Gymnasium's, as text."""
    found = differences(name)
    if found:
        return f"{name} of gymnax and of Gymnasium differ: {'; '.join(found)}."
    return (
        f"{name} of gymnax and of Gymnasium agree in single steps from {_COMPARED_STATES:,} states."
    )
