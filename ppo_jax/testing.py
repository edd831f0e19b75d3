"""Checks for environments of your own: everything that a training relies on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import envs
from ppo_jax.envs import checks
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete, Leaf, MultiDiscrete, leaves, shape_of
from ppo_jax.errors import ConfigError
from ppo_jax.policy.networks import ACTION_MASK
from ppo_jax.types import strongly_typed

_OUTSIDE = 10.0  # actions this many times beyond their bounds must act as the bounds do
_REPEATED = 64  # steps that end an episode, and others, are repeated with another key
_SUSPICIOUS = 3  # this many episodes that end in the same wrong way are no coincidence


def check_env(
    env: Any,
    env_params: Any = None,
    *,
    num_envs: int = 8,
    num_steps: int = 512,
    seed: int = 0,
) -> None:
    """Plays random actions in an environment, and checks everything that a training relies on.

    It checks shapes and dtypes; that values are in their spaces and finite; that `reset` and `step`
    can be compiled, mapped and repeated, and compile once; that a step returns the true successor
    and does not reset; that termination and truncation are told apart; the bounds of the lengths of
    episodes; that continuous actions are clipped; and that an action mask allows some action. The
    shapes and dtypes are checked by `make_trainer` as well.

    Args:
      env: a registered name, an `Environment`, or an object with the interface of gymnax 1.x or
        brax.
      env_params: its parameters; None for the default ones.
      num_envs: environments that are stepped together.
      num_steps: steps of each of them. Ends of episodes are checked only if some end within them.
      seed: random seed of the actions.

    Raises:
      ConfigError: names every fault in a sentence of its own.

    >>> check_env("CartPole-v1", num_steps=64)
    """
    env = envs.make(env) if isinstance(env, str) else envs.adapted(type(env).__name__, env)
    if env_params is not None:
        env = env._replace(params=env_params)
    env = env._replace(params=strongly_typed(env.params))
    # Shapes and tracing first: the other checks run the environment.
    checks.check_env(env)
    played = _play(env, num_envs, num_steps, jax.random.key(seed))
    # All faults are reported, so that a user can fix them together.
    faults = [fault for find in _FINDERS for fault in find(env, played)]
    if faults:
        raise ConfigError("\n".join(faults))


class _Played(NamedTuple):
    """Random play, `[T, N]`; the state and the action are those before the step."""

    key: jax.Array
    first_obs: Any  # [N, ...], of the first reset
    state: Any
    action: jax.Array
    step: Step
    length: jax.Array  # steps of the episode so far, this one included
    reset_obs: Any  # first observation of the episode that would follow if this one ended here


def _play(env: Environment, num_envs: int, num_steps: int, key: jax.Array) -> _Played:
    """Plays random actions, and resets where an episode ends."""
    reset = jax.vmap(env.reset, in_axes=(0, None))
    step = jax.vmap(env.step, in_axes=(0, 0, 0, None))

    def one_step(carry: Any, key: jax.Array) -> Any:
        obs, state, length = carry
        action_key, step_key, reset_key = jax.random.split(key, 3)
        action = _random_action(env, action_key, obs, (num_envs, *env.agent_axes))
        after = step(jax.random.split(step_key, num_envs), state, action, env.params)
        new_obs, new_state = reset(jax.random.split(reset_key, num_envs), env.params)
        done = jnp.logical_or(after.terminated, after.truncated)

        def choose(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        played = _Played(step_key, obs, state, action, after, length + 1, new_obs)
        obs = jax.tree.map(choose, new_obs, after.obs)
        state = jax.tree.map(choose, new_state, strongly_typed(after.state))
        return (obs, state, jnp.where(done, 0, length + 1)), played

    @jax.jit
    def play(key: jax.Array) -> tuple[Any, _Played]:
        reset_key, key = jax.random.split(key)
        obs, state = reset(jax.random.split(reset_key, num_envs), env.params)
        start = (obs, strongly_typed(state), jnp.zeros(num_envs, jnp.int32))
        return obs, jax.lax.scan(one_step, start, jax.random.split(key, num_steps))[1]

    first_obs, played = play(key)
    return played._replace(first_obs=first_obs)


def _random_action(
    env: Environment, key: jax.Array, obs: Any, batch_shape: tuple[int, ...]
) -> jax.Array:
    """Draws actions that the space, and a mask among the observations, allow."""
    space = env.action_space
    if isinstance(space, Box):
        low, high = (jnp.asarray(x, jnp.float32) for x in _bounds(space))
        low, high = (x.reshape(*[1] * len(batch_shape), *space.shape) for x in (low, high))
        u = jax.random.uniform(key, (*batch_shape, *space.shape))
        return (low + u * (high - low)).astype(space.dtype)
    sizes = space.num_values if isinstance(space, MultiDiscrete) else (space.num_values,)
    logits = jnp.zeros((*batch_shape, sum(sizes)))
    if isinstance(obs, dict) and ACTION_MASK in obs:
        logits = jnp.where(obs[ACTION_MASK].astype(bool), 0.0, -jnp.inf)
    parts = jnp.split(logits, np.cumsum(sizes)[:-1], axis=-1)
    keys = jax.random.split(key, len(sizes))
    action = jnp.stack(list(map(jax.random.categorical, keys, parts)), axis=-1).astype(jnp.int32)
    return action if isinstance(space, MultiDiscrete) else action[..., 0]


def _bounds(space: Box) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bounds of continuous actions; ±1 where there are none."""
    low, high = (np.asarray(bound, float) for bound in (space.low, space.high))
    size = int(np.prod(space.shape))
    low, high = (np.broadcast_to(x if x.size else 1.0, size) for x in (low, high))
    return np.where(np.isfinite(low), low, -1.0), np.where(np.isfinite(high), high, 1.0)


def _outside_spaces(env: Environment, played: _Played) -> Iterator[str]:
    """Finds observations outside of their space, and masks that allow nothing."""
    arrays = jax.tree.leaves(played.step.obs)
    firsts = jax.tree.leaves(played.first_obs)
    for space, array, first in zip(leaves(env.observation_space), arrays, firsts, strict=True):
        values = np.concatenate([np.asarray(first)[None], np.asarray(array)])
        low, high = _limits(space, values)
        if (values < low).any() or (values > high).any():
            yield (
                f"observations must be in their space; {env.name} returns values from "
                f"{values.min():g} to {values.max():g}, and the space is {space}. "
                "Change the space, or the observation."
            )
    obs = played.step.obs
    if not isinstance(obs, dict) or ACTION_MASK not in obs:
        return
    # No action follows the last observation of an episode.
    ends = _ends(played.step)
    ends = ends.reshape(*ends.shape, *[1] * len(env.agent_axes))
    is_allowed = np.asarray(obs[ACTION_MASK]).any(axis=-1) | ends
    if not is_allowed.all() or not np.asarray(played.first_obs[ACTION_MASK]).any(axis=-1).all():
        yield f"an action mask must allow some action; {env.name} has one that allows none."


def _limits(space: Leaf, values: np.ndarray) -> tuple[Any, Any]:
    """Returns the lowest and highest values of a space, which broadcast against values."""
    if isinstance(space, Discrete):
        return 0, space.num_values - 1
    if isinstance(space, MultiDiscrete):
        return 0, np.array(space.num_values) - 1
    if not space.low or not space.high or values.dtype == bool:
        return -np.inf, np.inf
    shape = shape_of(space)
    return np.reshape(space.low, shape), np.reshape(space.high, shape)


def _not_finite(env: Environment, played: _Played) -> Iterator[str]:
    """Finds NaN and infinity."""
    parts = {"reward": played.step.reward, "observation": played.step.obs}
    for name, tree in parts.items():
        for array in map(np.asarray, jax.tree.leaves(tree)):
            if not np.isfinite(array).all():
                step, index = (int(i[0]) for i in np.nonzero(~np.isfinite(array))[:2])
                yield (
                    f"the {name} must be finite; that of {env.name} is not at step {step} of "
                    f"environment {index}. Clip it, or end the episode before."
                )


def _same(one: Any, other: Any, *, exactly: bool = True) -> bool:
    """Returns whether two trees have the same values; random keys are compared by their data."""

    def values(tree: Any) -> list[Any]:
        return [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in map(jnp.asarray, jax.tree.leaves(tree))
        ]

    tolerance = 0.0 if exactly else 1e-4
    return all(
        np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
        for x, y in zip(values(one), values(other), strict=True)
    )


def _ends(step: Step) -> np.ndarray:
    return np.asarray(step.terminated, bool) | np.asarray(step.truncated, bool)


def _at(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _repeated(env: Environment, played: _Played, index: int) -> tuple[Any, ...]:
    """Returns `(key, state, action, params)`, the arguments of step `index` of environment 0."""
    num_envs = played.length.shape[1]
    key = jax.random.split(played.key[index], num_envs)[0]
    return key, _at(played.state, index, 0), jnp.asarray(played.action[index, 0]), env.params


def _not_pure(env: Environment, played: _Played) -> Iterator[str]:
    """Finds randomness and state that are not passed in, and mixed environments."""
    arguments = _repeated(env, played, 0)
    key = arguments[0]
    # Traced again each time: NumPy's random numbers are constants of a compiled function.
    first, second = (jax.jit(lambda *x: env.step(*x))(*arguments) for _ in range(2))
    resets = [jax.jit(lambda *x: env.reset(*x))(key, env.params) for _ in range(2)]
    if not _same(first, second) or not _same(*resets):
        yield (
            f"equal keys, states and actions must give equal results; {env.name} gives different "
            "ones the second time. Draw all random numbers from the key by jax.random, and keep "
            "everything that changes in the state."
        )
        # Then single calls differ from those of a vmap, too.
        return
    for index in (0, len(played.length) // 2):
        alone = jax.jit(env.step)(*_repeated(env, played, index))
        if not _same(alone, _at(played.step, index, 0), exactly=False):
            yield (
                f"jax.vmap must give what single calls give; a step of {env.name} differs. "
                "A function of one environment must not mix environments, or read global state."
            )
            return


def _compiled_twice(env: Environment, played: _Played) -> Iterator[str]:
    """Finds steps whose types change, so that they are compiled again."""
    traces = 0

    def counted(*arguments: Any) -> Step:
        nonlocal traces
        traces += 1
        return env.step(*arguments)

    step = jax.jit(counted)
    first_key, state, action, params = _repeated(env, played, 0)
    for key in jax.random.split(first_key, 3):
        state = strongly_typed(step(key, strongly_typed(state), action, params).state)
    if traces > 1:
        yield (
            f"a step must be compiled once; {env.name} is compiled {traces} times in three steps. "
            "Return arrays of the same shapes and dtypes from every step."
        )


def _mixed_ends(env: Environment, played: _Played) -> Iterator[str]:
    """Finds ends that are not bool, and time limits that are reported as a termination."""
    for name in ("terminated", "truncated"):
        dtype = getattr(played.step, name).dtype
        if dtype != np.dtype(bool):
            yield f"{name} must be bool; that of {env.name} is {dtype}. Compare, or cast it."
    longest = env.longest_episode(env.params)
    if longest is None:
        return
    at_limit = np.asarray(played.length) == int(longest)
    # Steps that are truncated as well count, because any termination stops bootstrapping.
    terminated = np.asarray(played.step.terminated, bool)[at_limit]
    if len(terminated) >= _SUSPICIOUS and terminated.all():
        yield (
            "an episode that a time limit cuts must be truncated, not terminated, because its last "
            f"state keeps its value; all {len(terminated)} episodes of {env.name} that reach "
            f"{longest:g} steps are terminated. Return truncated = time >= limit, and terminated "
            "without the limit."
        )


def _wrong_lengths(env: Environment, played: _Played) -> Iterator[str]:
    """Finds episodes that are shorter or longer than the environment says."""
    length = np.asarray(played.length)
    done = _ends(played.step)
    if done.any() and length[done].min() < env.shortest_episode:
        yield (
            "an episode must have at least shortest_episode steps, or two of them may start alike; "
            f"{env.name} says {env.shortest_episode}, and one ended after {length[done].min()}. "
            "Lower shortest_episode."
        )
    longest = env.longest_episode(env.params)
    if longest is not None and length.max() > longest:
        yield (
            f"an episode must end within longest_episode steps; {env.name} says {longest:g}, and "
            f"one went on after {length.max() - 1} steps. Truncate it, or raise the limit."
        )


def _resetting(env: Environment, played: _Played) -> Iterator[str]:
    """Finds steps that reset: the successor at an end must be that of the episode that ended."""
    done = _ends(played.step)
    if not done.any():
        return
    is_reset = False
    # A number in the state that counts steps must count the last one, too.
    pairs = zip(jax.tree.leaves(played.state), jax.tree.leaves(played.step.state), strict=True)
    for before, after in pairs:
        if before.ndim != 2 or not jnp.issubdtype(before.dtype, jnp.number):
            continue
        change = np.asarray(after) - np.asarray(before)
        counts = (change[~done] == 1).all() and (~done).any()
        # The counter falls to 0 where the episode ends, and rises everywhere else.
        is_reset |= bool(counts and not (change[done] == 1).any() and (after[done] == 0).all())
    # If all episodes start with one observation, and others differ, no episode should end with it.
    starts = [np.asarray(x) for x in jax.tree.leaves(played.reset_obs)]
    ends = [np.asarray(x)[done] for x in jax.tree.leaves(played.step.obs)]
    within = [np.asarray(x)[~done] for x in jax.tree.leaves(played.step.obs)]
    differ = any((x[0, 0] != inner).any() for x, inner in zip(starts, within, strict=True))
    if done.sum() >= _SUSPICIOUS and differ and all((x == x[:1, :1]).all() for x in starts):
        is_reset |= all((end == x[0, 0]).all() for x, end in zip(starts, ends, strict=True))
    if is_reset or _depends_on_the_key_at_ends_alone(env, played, done):
        yield (
            "a step must return the true successor and not reset; at the ends of its episodes "
            f"{env.name} returns the start of new ones. Leave the reset out: the rollout resets."
        )


def _depends_on_the_key_at_ends_alone(env: Environment, played: _Played, done: np.ndarray) -> bool:
    """Returns whether successors are random where episodes end, and nowhere else.

    A step that resets draws the new episode from its key.
    """
    # Random dynamics tell nothing: there, other steps depend on the key as well.
    ends, others = (np.argwhere(x)[:_REPEATED] for x in (done, ~done))
    if not (len(ends) and len(others)):
        return False
    where = tuple(np.concatenate([ends, others]).T)
    state, action, obs = jax.tree.map(
        lambda x: x[where], (played.state, played.action, played.step.obs)
    )
    keys = jax.random.split(jax.random.fold_in(played.key[0], 1), len(where[0]))
    step = jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))
    again = step(keys, state, action, env.params).obs
    differs = np.any(
        [
            np.reshape(np.asarray(x) != np.asarray(y), (len(keys), -1)).any(axis=1)
            for x, y in zip(jax.tree.leaves(obs), jax.tree.leaves(again), strict=True)
        ],
        axis=0,
    )
    return bool(differs[: len(ends)].all() and not differs[len(ends) :].any())


def _unclipped_actions(env: Environment, played: _Played) -> Iterator[str]:
    """Finds steps that take continuous actions beyond their bounds."""
    space = env.action_space
    # There is nothing to clip to without bounds on both sides.
    if not isinstance(space, Box) or not space.low or not space.high:
        return
    if not np.isfinite([*space.low, *space.high]).all():
        return
    key, state, _, params = _repeated(env, played, 0)
    bounds = [np.reshape(x, space.shape).astype(space.dtype) for x in _bounds(space)]
    step = jax.jit(env.step)
    for bound in bounds:
        centre = (bounds[0] + bounds[1]) / 2
        outside = (centre + _OUTSIDE * (bound - centre)).astype(space.dtype)
        if not _same(step(key, state, bound, params), step(key, state, outside, params)):
            yield (
                "a step must clip continuous actions to their bounds, because a Gaussian policy "
                f"exceeds them; {env.name} treats {outside.ravel().tolist()} differently than "
                f"{bound.ravel().tolist()}. Call jnp.clip first."
            )
            return


_FINDERS = (
    _outside_spaces,
    _not_finite,
    _not_pure,
    _compiled_twice,
    _mixed_ends,
    _wrong_lengths,
    _resetting,
    _unclipped_actions,
)
