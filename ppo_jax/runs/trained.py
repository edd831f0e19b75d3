"""The policy of a run, loaded and evaluated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.special

from ppo_jax.config import Config
from ppo_jax.envs import make_env
from ppo_jax.errors import ConfigError, require_seed
from ppo_jax.evaluation import Evaluation
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.periodic_evaluation import make_evaluate


def load(
    run_dir: str | Path, *, seed: int | None = None, best: bool = False, network: Any = None
) -> Policy:
    """Returns the policy of a run, which is callable and a pytree.

    Args:
      run_dir: directory that `train` wrote.
      seed: seed whose policy is loaded, for a run of several seeds; None takes the first.
      best: the best policy of the evaluations while the run trained (`eval_every`), instead of the
        last one.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: there is no run, or it has no policy yet, or not that seed.
    """
    directory = RunDirectory.open(run_dir)
    seeds = directory.read_seeds()
    policy = read_policy(directory, network, best=best)
    if isinstance(seeds, int):
        if seed not in (None, seeds):
            raise ConfigError(f"seed must be one of the run's; got {seed}. It has {seeds}.")
        return policy
    if seed is not None and seed not in seeds:
        raise ConfigError(f"seed must be one of the run's; got {seed}. It has {seeds}.")
    index = 0 if seed is None else seeds.index(seed)
    # Policies of all seeds are stacked along the first axis.
    return jax.tree.map(lambda x: x[index], policy)


def load_config(run_dir: str | Path, *, network: Any = None) -> tuple[Config, HParams]:
    """Returns the settings and the hyperparameters of a run, to train it again or to change them.

    Args:
      run_dir: directory that `train` wrote.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: there is no run, or a part that it names is not registered.
    """
    return RunDirectory.open(run_dir).read_config(network)


def evaluate_run(
    run_dir: str | Path,
    *,
    seed: int = 0,
    num_episodes: int = 128,
    greedy: bool = True,
    best: bool = False,
    network: Any = None,
) -> dict[str, Any]:
    """Evaluates every policy of a run again; returns a summary as `summarize` does.

    Args:
      run_dir: directory that `train` wrote.
      seed: random seed of the evaluation.
      num_episodes: episodes for each seed of the run.
      greedy: take the most likely actions instead of sampling.
      best: the best policies while the run trained, instead of the last ones.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: there is no run, or it has no policy yet.
    """
    directory = RunDirectory.open(run_dir)
    config, _ = directory.read_config(network)
    seeds = directory.read_seeds()
    policy = read_policy(directory, network, best=best)
    env = make_env(config)
    require_seed(seed)
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(policy.spec, name), getattr(env, name)
        if ours != theirs:
            raise ConfigError(
                f"a policy must be evaluated in an environment with its spaces; that of {run_dir} "
                f"has the {name} {ours}, and {env.name} has {theirs}."
            )
    key = jax.random.key(seed)
    keys = key if isinstance(seeds, int) else jax.random.split(key, len(seeds))
    evaluation = make_evaluate(env, keys, num_episodes, greedy=greedy)(policy)
    return summarize(evaluation, [seeds] if isinstance(seeds, int) else seeds, greedy=greedy)


def read_policy(directory: RunDirectory, network: Any, *, best: bool) -> Policy:
    """Reads the last or the best policy of a run, stacked if it has several seeds."""
    policy = directory.read_best(network).policy if best else directory.read_policy(network)
    assert policy is not None, "one that was written"
    return policy


_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def summarize(evaluation: Evaluation, seeds: Sequence[int], *, greedy: bool) -> dict[str, Any]:
    """Returns the statistics of an evaluation, for each seed and over all, as JSON.

    `eval/return_interval` is the 95 % interval of the mean by Student's t distribution, from the
    episodes of one policy: it says nothing of how policies of other seeds differ.
    """
    returns = np.atleast_2d(evaluation.returns).astype(float)
    lengths = np.atleast_2d(evaluation.lengths)
    finished = np.atleast_2d(evaluation.finished)
    own = evaluation.metrics
    return {
        "eval/return": returns.mean(),
        "episodes": returns.shape[1],
        "greedy": greedy,
        "seeds": [
            {
                **{f"eval/{name}": np.atleast_2d(x)[i].mean() for name, x in own.items()},
                "seed": seed,
                "eval/return": returns[i].mean(),
                "eval/return_std": returns[i].std(),
                "eval/return_interval": _interval_of_mean(returns[i]),
                "eval/return_min": returns[i].min(),
                "eval/return_quantiles": {str(q): np.quantile(returns[i], q) for q in _QUANTILES},
                "eval/return_max": returns[i].max(),
                "eval/length": lengths[i].mean(),
                "eval/finished": finished[i].mean(),
            }
            for i, seed in enumerate(seeds)
        ],
    }


def _interval_of_mean(values: np.ndarray) -> list[float | None]:
    """Returns the 95 % interval of the mean of a sample; None for a sample of one."""
    if len(values) < 2:
        return [None, None]
    # Student's t instead of the normal distribution: few episodes estimate the standard deviation.
    error = values.std(ddof=1) / np.sqrt(len(values))
    half = scipy.special.stdtrit(len(values) - 1, 0.975) * error
    return [values.mean() - half, values.mean() + half]
