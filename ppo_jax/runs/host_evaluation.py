"""Evaluation of a policy over complete episodes of environments on the host."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import HostEnvs
from ppo_jax.evaluation import Evaluation
from ppo_jax.policy.policy import Policy
from ppo_jax.stages import host_rollout

_EVALUATED_TOGETHER = 16  # environments, each of which may be a process


def evaluate_on_host(
    policy: Policy,
    env: Environment,
    key: jax.Array,
    num_episodes: int,
    *,
    greedy: bool = True,
    max_steps: int = 100_000,
) -> Evaluation:
    """Plays complete episodes in an environment on the host.

    Each environment contributes a fixed number of episodes. An average over the episodes that end
    first would count short episodes more often than long ones.

    Args:
      policy: acts.
      env: made by `envs.host.make_host_environment`.
      key: random key.
      num_episodes: E.
      greedy: take the most likely actions instead of sampling.
      max_steps: bound on the steps of an episode. An environment that reaches it plays no more, and
        the cut episode counts for all that it had left.

    Returns:
      `Evaluation`, each field `[E]`.
    """
    num_envs = min(num_episodes, _EVALUATED_TOGETHER)
    # Number of episodes of each environment; these numbers differ by at most one.
    each = [len(range(i, num_episodes, num_envs)) for i in range(num_envs)]
    played: list[list[tuple[float, int, bool]]] = [[] for _ in range(num_envs)]
    make_envs = env.host.make_evaluation_envs or env.host.make_envs
    envs: HostEnvs = make_envs(num_envs)
    try:
        policy, key = host_rollout.placed((policy, key))
        memory = host_rollout.placed(policy.initial_recurrent_state((num_envs,)))
        state, index = host_rollout.reset([envs], host_rollout.seed_of(key), memory), 0
        while any(len(x) < count for x, count in zip(played, each, strict=True)):
            acted = host_rollout.act(
                policy,
                state.obs,
                state.recurrent_state,
                start=np.asarray(state.start),
                key=key,
                index=np.uint32(index),
                greedy=greedy,
            )
            envs.send(np.asarray(acted.to_env))
            step = envs.recv()
            returns, lengths, state = host_rollout.after_step(state, step, acted.recurrent_state)
            done = step.terminated | step.truncated
            # An episode that never ends, as of a policy that is stuck, must not hold up the run.
            is_cut = (lengths >= max_steps) & ~done
            for i in np.flatnonzero(done | is_cut):
                count = each[i] - len(played[i]) if is_cut[i] else 1
                played[i] += [(returns[i], lengths[i], not is_cut[i])] * count
            index += 1
    finally:
        envs.close()
    first: Sequence[Any] = [
        episode for one, count in zip(played, each, strict=True) for episode in one[:count]
    ]
    found: Any = Evaluation
    return found(
        returns=np.array([x[0] for x in first], np.float32),
        lengths=np.array([x[1] for x in first], np.int32),
        finished=np.array([x[2] for x in first], bool),
    )
