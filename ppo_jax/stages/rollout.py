"""The first stage: acting in the environments for T steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Environment, vectorized
from ppo_jax.ops import packing
from ppo_jax.ops.blocks import largest_divisor
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import head_of
from ppo_jax.types import EpisodeStats, RolloutState, Trajectory, strongly_typed

Carry = tuple[RolloutState, EpisodeStats, Any]
"""State, sums over ended episodes, and the number of initial states taken from the pool so far. The
last one is None without a pool."""

# Bytes of the initial states that are drawn together. Accelerators draw an eighth of the trajectory
# if that is more; on a CPU they should stay in the cache of a core.
_DRAWN_BYTES = 2**22
_DRAWN_BYTES_CPU = 2**19
# An iteration of an accelerator's loop has at most this many steps, and this many operations in
# total. On an H100 an update of CartPole takes 6.8 ms with two steps and 6.4 ms with eight, one of
# Breakout 16.8 and 14.8 ms. Craftax with eight steps compiles in 150 s instead of 54 s, and gains
# nothing.
_UNROLLED_STEPS = 8
_UNROLLED_OPERATIONS = 10_000


class _Plan(NamedTuple):
    """Parameters of the loop over steps, chosen for one platform."""

    make_packing: Callable[[], packing.Packing | packing.NoPacking]
    """Returns a new packing of what the loop carries and stores. Accelerators launch a kernel for
    each array."""
    unroll: int
    """Steps in one iteration of the loop, at most."""
    drawn_bytes: int
    """Memory of the new episodes that are drawn together, if they do not come from a pool."""


def reset(
    env: Environment, env_params: Any, key: jax.Array, *, num_envs: int, recurrent_state: Any = None
) -> RolloutState:
    """Starts an episode in each environment.

    Args:
      env: the environment.
      env_params: its parameters.
      key: random key.
      num_envs: N.
      recurrent_state: of the policy, `[N, ...]`; None without a memory.
    """
    keys = jax.random.split(key, num_envs)
    obs, env_state = strongly_typed(vectorized(env).reset(keys, env_params))
    return RolloutState(
        env_state=env_state,
        obs=obs,
        episode_return=jnp.zeros(num_envs, jnp.float32),
        episode_length=jnp.zeros(num_envs, jnp.int32),
        discounted_return=jnp.zeros(num_envs, jnp.float32),
        recurrent_state=recurrent_state,
        episode_metrics={name: jnp.zeros(num_envs, jnp.float32) for name in env.metrics},
    )


@jax.named_scope("rollout")
def rollout(
    env: Environment,
    env_params: Any,
    policy: Policy,
    state: RolloutState,
    key: jax.Array,
    *,
    num_steps: int,
    reset_pool: int | None = None,
) -> tuple[RolloutState, Trajectory, EpisodeStats]:
    """Acts for `num_steps` steps in every environment.

    The loop computes only what the next action needs. Noise and keys are drawn before the loop.
    `stages.collect` computes log-probabilities and values after it, for many steps at a time.

    Args:
      env: the environment.
      env_params: its parameters.
      policy: acts.
      state: of the N environments at the first step.
      key: random key.
      num_steps: T.
      reset_pool: number of initial states in the pool, see `Config.reset_pool`; None draws one for
        every new episode.

    Returns:
      The state after the last step, the trajectory `[T, N]`, and sums over the episodes that ended.
    """
    # Static: looked up while tracing.
    head = head_of(policy.spec)
    num_envs = state.episode_return.shape[0]
    noise_key, env_key, pool_key = jax.random.split(key, 3)
    noise = head.noise(noise_key, (num_steps, num_envs))
    env_keys = jax.random.split(env_key, (num_steps, num_envs, 2))
    many = vectorized(env)

    def act(drawn: tuple, carry: Carry, inputs: tuple) -> tuple[Carry, Any]:
        state, ended, used = carry
        noise_t, step_keys = inputs
        action_params, recurrent_state = policy.step(state.obs, state.recurrent_state, state.start)
        action = head.sample(action_params, noise_t)
        step = many.step(step_keys, state.env_state, head.to_env(action), env_params)
        transition = Trajectory(
            obs=state.obs,
            action=action,
            action_params=action_params,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            final_obs=step.obs,
            metrics={name: x.astype(jnp.float32) for name, x in step.metrics.items()},
        )
        # The rollout resets environments itself, because suites differ in whether and how they do.
        done = transition.done
        episode_return = state.episode_return + step.reward
        episode_length = state.episode_length + 1
        ended = EpisodeStats(  # [N] each: sums over environments wait until after the loop
            return_sum=ended.return_sum + jnp.where(done, episode_return, 0.0),
            length_sum=ended.length_sum + jnp.where(done, episode_length, 0),
            num_episodes=ended.num_episodes + done,
        )
        new_episode, used = (drawn, None) if used is None else many.take(drawn, done, used)
        obs, env_state = many.where(done, new_episode, (step.obs, step.state))
        state = state.replace(
            env_state=env_state,
            obs=obs,
            episode_return=jnp.where(done, 0.0, episode_return),
            episode_length=jnp.where(done, 0, episode_length),
            recurrent_state=recurrent_state,
        )
        return (state, ended, used), transition

    def draw(keys: jax.Array) -> tuple[Any, Any]:
        return strongly_typed(many.reset(keys, env_params))

    zeros = jnp.zeros(num_envs, jnp.int32)
    none_ended = EpisodeStats(zeros.astype(jnp.float32), length_sum=zeros, num_episodes=zeros)
    act = jax.jit(act)  # traced once, for both platforms
    if reset_pool is None:
        # Drawing only where an episode ends would need a branch, and under `vmap` both sides of a
        # branch are computed anyway. Within `shortest_episode` steps an environment starts at most
        # one new episode, so that one draw for all environments serves a whole block of steps.
        used = None
        size = largest_divisor(num_steps, at_most=env.shortest_episode)
        new_episodes = jax.eval_shape(draw, env_keys[0, :, 1])
        loop: Any = partial(_act_in_groups, act, jax.jit(jax.vmap(draw)), size)
    else:
        used = jnp.zeros((), jnp.int32)
        new_episodes = draw(jax.random.split(pool_key, reset_pool * env.num_agents))
        loop = partial(_act_from_pool, act, new_episodes)
    carry = (state, none_ended, used)
    first = jax.eval_shape(lambda: (noise[0], env_keys[0, :, 0]))
    unroll = _unrolled_steps(jax.make_jaxpr(act)(new_episodes, carry, first).jaxpr)
    # A trajectory holds each observation and its true successor.
    trajectory_bytes = 2 * _num_bytes(state.obs) * num_steps
    plan = _Plan(packing.Packing, unroll, max(_DRAWN_BYTES, trajectory_bytes // 8))
    narrow = plan._replace(make_packing=partial(packing.Packing, packs_wide=False))
    (state, ended, _), trajectory = jax.lax.platform_dependent(
        carry,
        (noise, env_keys),
        cpu=partial(loop, plan=_Plan(packing.NoPacking, 1, _DRAWN_BYTES_CPU)),
        tpu=partial(loop, plan=narrow),
        default=partial(loop, plan=plan),
    )
    return state, trajectory, jax.tree.map(jnp.sum, ended)


def _act_in_groups(
    act: Callable[[Any, Carry, Any], tuple[Carry, Trajectory]],
    draw: Callable[[jax.Array], Any],
    size: int,
    carry: Carry,
    inputs: tuple[jax.Array, jax.Array],
    *,
    plan: _Plan,
) -> tuple[Carry, Trajectory]:
    """Acts at every step; draws the initial states of several blocks of steps together.

    A draw for each block would launch several kernels each time.

    Args:
      act: `(new_episodes, carry, (noise, keys)) -> (carry, transition)`, one step.
      draw: `keys [blocks, N] -> new_episodes`, observations and states `[blocks, N, ...]`.
      size: steps of a block; in a block, every environment starts at most one new episode.
      carry: before the first step.
      inputs: noise `[T, N, ...]`, and keys of steps and of draws `[T, N, 2]`.
      plan: of the platform.
    """
    num_steps = len(inputs[1])
    state, *_ = carry
    episode_bytes = _num_bytes((state.obs, state.env_state))
    # At least four groups: with a single one, CartPole with 4 x 128 steps is 5 % slower on a CPU.
    num_blocks = largest_divisor(
        num_steps // size,
        at_most=max(1, min(plan.drawn_bytes // episode_bytes, num_steps // size // 4)),
    )
    carries, episodes = plan.make_packing(), plan.make_packing()
    # XLA copies the arrays of a carry that a step both reads and replaces. Packed, and with several
    # steps in an iteration, it copies one or two arrays an iteration.
    scan: Any = partial(packing.packed_scan, make_packing=plan.make_packing)
    steps = largest_divisor(num_blocks * size, at_most=plan.unroll)

    def act_in_group(packed: Any, inputs: tuple) -> tuple[Any, Trajectory]:
        noise, keys = inputs
        # The first step's key serves the block; those of later steps are not used.
        new_episodes = jax.vmap(episodes.pack)(draw(keys[::size, :, 1]))

        def act_at(packed: Any, inputs: tuple) -> tuple[Any, Trajectory]:
            index, *rest = inputs
            new_episode = episodes.unpack(jax.tree.map(lambda x: x[index // size], new_episodes))
            carry, transition = act(new_episode, carries.unpack(packed), tuple(rest))
            return carries.pack(carry), transition

        indices = jnp.arange(len(keys), dtype=jnp.uint32)
        return scan(act_at, packed, (indices, noise, keys[:, :, 0]), unroll=steps)

    groups = jax.tree.map(lambda x: x.reshape(-1, num_blocks * size, *x.shape[1:]), inputs)
    packed, trajectory = scan(act_in_group, carries.pack(carry), groups)
    trajectory = jax.tree.map(lambda x: x.reshape(num_steps, *x.shape[2:]), trajectory)
    return carries.unpack(packed), trajectory


def _act_from_pool(
    act: Callable[[Any, Carry, Any], tuple[Carry, Trajectory]],
    pool: Any,
    carry: Carry,
    inputs: tuple[jax.Array, jax.Array],
    *,
    plan: _Plan,
) -> tuple[Carry, Trajectory]:
    """Acts at every step; new episodes are those of a pool.

    Args:
      act: as in `_act_in_groups`.
      pool: observations and states of new episodes.
      carry: before the first step.
      inputs: noise `[T, N, ...]`, and keys of steps `[T, N, 2]`, the second of which are not used.
      plan: of the platform.
    """
    carries = plan.make_packing()

    def act_at(packed: Any, inputs: tuple) -> tuple[Any, Trajectory]:
        carry, transition = act(pool, carries.unpack(packed), inputs)
        return carries.pack(carry), transition

    noise, keys = inputs
    packed, trajectory = packing.packed_scan(
        act_at,
        carries.pack(carry),
        (noise, keys[:, :, 0]),
        unroll=largest_divisor(len(keys), at_most=plan.unroll),
        make_packing=plan.make_packing,
    )
    return carries.unpack(packed), trajectory


def _unrolled_steps(step: Any) -> int:
    """Returns how many steps an iteration of an accelerator's loop has, given a step's jaxpr."""
    return max(1, min(_UNROLLED_STEPS, _UNROLLED_OPERATIONS // _num_operations(step)))


def _num_operations(jaxpr: Any) -> int:
    """Returns the number of operations of a jaxpr; a loop's body counts once."""
    inner = (
        getattr(x, "jaxpr", x)  # closed, or with its constants as arguments
        for equation in jaxpr.eqns
        for x in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
    )
    return len(jaxpr.eqns) + sum(_num_operations(x) for x in inner if hasattr(x, "eqns"))


def _num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
