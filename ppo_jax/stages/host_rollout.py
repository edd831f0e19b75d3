"""The first stage for environments on the host: acting is compiled, and stepping is not."""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs.host import HostEnvs, HostStep
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import head_of
from ppo_jax.stages.collect import Rollout
from ppo_jax.types import EpisodeStats, RolloutState, Trajectory

_SEEDS = 2**31 - 1
_ENVS_STREAM = 0x5EED  # folded into a key, so that environments and policies draw differently


class Acted(NamedTuple):
    """The actions of a policy for N environments."""

    to_env: jax.Array  # [N, ...], as environments take them
    action: jax.Array  # [N, ...], as sampled
    action_params: Any  # [N, ...]
    recurrent_state: Any  # [N, ...]


@partial(jax.jit, static_argnames="greedy")
def act(
    policy: Policy,
    obs: Any,
    recurrent_state: Any,
    *,
    start: Any,
    key: jax.Array,
    index: Any,
    greedy: bool = False,
) -> Acted:
    """Returns the actions of a policy for N environments, and its next recurrent state.

    Args:
      policy: acts.
      obs: observations `[N, ...]`.
      recurrent_state: before them, `[N, ...]`; None without a memory.
      start: `[N]`, the observation is the first of an episode.
      key: random key of a rollout.
      index: number of the call in the rollout.
      greedy: take the most likely actions instead of sampling.
    """
    head = head_of(policy.spec)
    action_params, recurrent_state = policy.step(obs, recurrent_state, start)
    if greedy:
        action = head.mode(action_params)
    else:
        noise = head.noise(jax.random.fold_in(key, index), start.shape)
        action = head.sample(action_params, noise)
    return Acted(head.to_env(action), action, action_params, recurrent_state)


def placed(tree: Any) -> Any:
    """Returns arrays that are committed to the default device.

    Otherwise `act` would be compiled three times: for arguments from NumPy, for new arrays of JAX,
    and for results of a compiled update.
    """
    return jax.device_put(tree, next(iter(jnp.zeros(()).devices())))


def seed_of(key: jax.Array) -> int:
    """Returns a seed for environments on the host."""
    return int(jax.random.randint(jax.random.fold_in(key, _ENVS_STREAM), (), 0, _SEEDS))


def reset(groups: Sequence[HostEnvs], seed: int, recurrent_state: Any) -> RolloutState:
    """Starts an episode in each environment of all groups."""
    obs = []
    for envs in groups:
        obs.append(envs.reset(seed))
        seed += len(jax.tree.leaves(obs[-1])[0])  # those of all environments are consecutive
    merged = _concatenated(obs)
    num_envs = len(jax.tree.leaves(merged)[0])
    zeros: Any = np.zeros(num_envs, np.float32)
    lengths: Any = np.zeros(num_envs, np.int32)
    return RolloutState((), merged, zeros, lengths, zeros, recurrent_state)


def rollout(
    groups: Sequence[HostEnvs],
    policy: Policy,
    state: RolloutState,
    key: jax.Array,
    *,
    num_steps: int,
) -> Rollout:
    """Acts for `num_steps` steps in every environment.

    With two groups that step in the background, the policy acts for one while the other steps. The
    results do not depend on the timing.

    Args:
      groups: of environments, of equal numbers; one or two.
      policy: acts.
      state: of all environments at the first step.
      key: random key.
      num_steps: T.
    """
    # Between rollouts the state is on the device, as a part of the training's.
    state = jax.device_get(state)
    size = len(state.episode_length) // len(groups)
    parts = []
    for i, envs in enumerate(groups):
        share = jax.tree.map(operator.itemgetter(slice(i * size, (i + 1) * size)), state)
        parts.append(_Group(envs, policy, share, key, i))
    # JAX returns before the actions are computed. The device works on those of one group while
    # the other steps.
    for part in parts:
        part.act()
    for _ in range(num_steps):
        for part, other in zip(parts, parts[1:] + parts[:1], strict=True):
            part.send()
            # With a single group this is the step that was just sent. The first of two in the first
            # step has no other to wait for.
            if other.is_stepping:
                other.recv()
                # The actions after the last step are those of the next rollout's policy.
                if len(other.steps) < num_steps:
                    other.act()
    for part in parts:
        if part.is_stepping:
            part.recv()
    return Rollout(
        before=state,
        trajectory=_concatenated([part.trajectory() for part in parts], axis=1),
        after=_concatenated([part.state for part in parts]),
        ended=jax.tree.map(lambda *x: sum(x[1:], start=x[0]), *(part.ended for part in parts)),
    )


class _Group:
    """Some environments during a rollout."""

    def __init__(
        self, envs: HostEnvs, policy: Policy, state: RolloutState, key: jax.Array, index: int
    ) -> None:
        self.envs, self.policy = envs, placed(policy)
        self.state = state.replace(recurrent_state=placed(state.recurrent_state))
        self.key = placed(jax.random.fold_in(key, index))  # groups draw different numbers
        self.steps: list[HostStep] = []
        self.obs: list[Any] = []
        self.acted: list[Acted] = []
        self.is_stepping = False
        zero: Any = np.zeros((), np.int32)
        self.ended: Any = EpisodeStats(zero.astype(np.float32), zero, zero)

    def act(self) -> None:
        """Starts to compute the actions; the device works while the host goes on."""
        state = self.state
        self.obs.append(state.obs)
        self.acted.append(
            act(
                self.policy,
                state.obs,
                state.recurrent_state,
                start=np.asarray(state.start),
                key=self.key,
                index=np.uint32(len(self.steps)),
            )
        )

    def send(self) -> None:
        """Waits for the actions, and starts the step."""
        self.envs.send(np.asarray(self.acted[-1].to_env))
        self.is_stepping = True

    def recv(self) -> None:
        """Waits for the step."""
        step, self.is_stepping = self.envs.recv(), False
        self.steps.append(step)
        returns, lengths, self.state = after_step(self.state, step, self.acted[-1].recurrent_state)
        done = step.terminated | step.truncated
        self.ended = EpisodeStats(
            return_sum=self.ended.return_sum + np.sum(returns[done], dtype=np.float32),
            length_sum=self.ended.length_sum + np.sum(lengths[done], dtype=np.int32),
            num_episodes=self.ended.num_episodes + np.sum(done, dtype=np.int32),
        )

    def trajectory(self) -> Trajectory:
        """Returns all steps, `[T, N]`."""

        # Copied to the host: most arrays come from there, and the update takes them all together.
        def stacked(trees: Sequence[Any]) -> Any:
            return jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *trees)

        return Trajectory(
            obs=stacked(self.obs),
            action=stacked([x.action for x in self.acted]),
            action_params=stacked([x.action_params for x in self.acted]),
            reward=stacked([x.reward for x in self.steps]),
            terminated=stacked([x.terminated for x in self.steps]),
            truncated=stacked([x.truncated for x in self.steps]),
            final_obs=stacked([x.final_obs for x in self.steps]),
        )


def after_step(
    state: RolloutState, step: HostStep, recurrent_state: Any
) -> tuple[np.ndarray, np.ndarray, RolloutState]:
    """Adds a step to the current episodes.

    Returns:
      `(returns, lengths, state)`: return and length of each episode with this step, `[N]`, and the
      state after it, in which episodes that ended count from 0 again.
    """
    done = step.terminated | step.truncated
    returns = np.asarray(state.episode_return) + step.reward
    lengths = np.asarray(state.episode_length) + np.int32(1)
    after = state.replace(
        obs=step.obs,
        episode_return=np.where(done, np.float32(0), returns),
        episode_length=np.where(done, np.int32(0), lengths),
        recurrent_state=recurrent_state,
    )
    return returns, lengths, after


def _concatenated(trees: Sequence[Any], axis: int = 0) -> Any:
    def join(*parts: Any) -> Any:
        return (jnp if isinstance(parts[0], jax.Array) else np).concatenate(parts, axis)

    # A single group is not copied: for images, the copy takes a tenth of the rollout's time.
    return jax.tree.map(join, *trees) if len(trees) > 1 else trees[0]
