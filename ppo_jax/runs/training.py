"""A training compiled for its devices: a start, and updates in pieces of any length."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppo_jax.config import Config
from ppo_jax.devices import MEMBER_AXIS, member_sharding, state_shardings
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.population.member import Guard, guarded_step, initial_guard
from ppo_jax.runs import device_memory, processes
from ppo_jax.runs.kept import made_once
from ppo_jax.stages.metrics import Metrics
from ppo_jax.trainer import Trainer
from ppo_jax.types import TrainState

LARGEST_PIECE = 1024  # updates; bounds the buffer of metrics on the device


class Piece(NamedTuple):
    """The results of a piece, which is a number of consecutive updates."""

    state: TrainState
    guard: Guard  # [seeds], in NumPy
    metrics: Metrics  # [count, seeds], in NumPy


class Training(NamedTuple):
    """The compiled programs of a training, of one seed or of several."""

    start: Callable[[], TrainState]
    advance: Callable[[TrainState, Guard, int, int], Piece]
    """`(state, guard, first, count) -> piece`: runs the updates `first` to `first + count − 1`."""
    state_shapes: TrainState
    """Shapes, dtypes and placements of the state."""
    metric_shapes: Metrics
    """Shapes and dtypes of the metrics of one update, `[seeds]`."""
    num_bytes: int
    """Memory of the largest program on one device."""
    close: Callable[[], None] = lambda: None
    """Ends the processes of environments on the host, if there are any."""


def compile_training(
    trainer: Trainer,
    config: Config,
    keys: jax.Array,
    hparams: HParams,
    *,
    mesh: Mesh | None,
    policy: Policy | None = None,
) -> Training:
    """Compiles a training. Nothing is allocated before its memory is known to fit.

    Args:
      trainer: of the config.
      config: describes the training.
      keys: one random key, or the keys of several seeds.
      hparams: complete.
      mesh: of the trainer, whose axis `member` divides the seeds; None for one device.
      policy: all seeds start from it; None draws new parameters for each.

    Raises:
      ConfigError: the training does not fit the memory of its devices.
    """
    hparams = jax.tree.map(jnp.float32, hparams)
    has_seeds = bool(keys.ndim)
    init, advance = made_once(
        trainer,
        ("training", config, mesh, has_seeds),
        lambda: _functions(trainer, config, mesh, has_seeds=has_seeds),
    )
    # The hyperparameters are arguments of both programs, so that they round alike.
    start = init.lower(keys, hparams, None, policy).compile()
    state_shapes = output_shapes(start)
    guard = jax.eval_shape(lambda: initial_guard(keys.shape))
    lowered = advance.lower(state_shapes, guard, hparams, np.int32(0), np.int32(1))
    program = lowered.compile()
    num_bytes = max(map(device_memory.num_bytes, (start, program)))
    require_memory(num_bytes, config, keys.size, num_agents=trainer.env.num_agents)
    *_, rows = lowered.out_info

    # The guard is a few numbers, which the host needs after each piece.
    def advance_on_host(state: TrainState, guard: Guard, first: int, count: int) -> Piece:
        guard = jax.tree.map(lambda x: np.reshape(x, keys.shape), guard)
        state, guard, metrics = program(state, guard, hparams, np.int32(first), np.int32(count))
        # The transfer of the metrics waits for the device; there is no other synchronisation.
        metrics = jax.tree.map(lambda x: np.asarray(x)[:count].reshape(count, -1), metrics)
        return Piece(state, jax.tree.map(lambda x: np.asarray(x).reshape(-1), guard), metrics)

    return Training(
        start=lambda: start(keys, hparams, None, policy),
        advance=advance_on_host,
        state_shapes=state_shapes,
        metric_shapes=jax.tree.map(lambda x: jax.ShapeDtypeStruct((keys.size,), x.dtype), rows),
        num_bytes=num_bytes,
    )


def _functions(
    trainer: Trainer, config: Config, mesh: Mesh | None, *, has_seeds: bool
) -> tuple[Any, Any]:
    """Returns the jitted functions of a training, its start and a piece of its updates.

    Args:
      trainer: of the config.
      config: describes the training.
      mesh: as of `compile_training`.
      has_seeds: the functions take the keys of several seeds.
    """
    capacity = min(config.num_updates, LARGEST_PIECE)
    init, step = trainer.init, guarded_step(trainer, config.max_skipped_updates, config.num_updates)
    placed: Any = None  # of a single seed: the trainer places its state
    if has_seeds:
        assert mesh is not None, "seeds have one"
        # Hyperparameters are shared: seeds of a run differ in their keys alone.
        axis = MEMBER_AXIS if config.num_devices > 1 else None
        init = jax.vmap(init, in_axes=(0, None, None, None), spmd_axis_name=axis)
        step = jax.vmap(step, in_axes=(0, 0, None, None), spmd_axis_name=axis)
        placed = member_sharding(mesh) if axis is None else state_shardings(mesh)

    def advance(
        state: TrainState, guard: Guard, hparams: HParams, first: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Guard, Metrics]:
        def one_update(i: jax.Array, carry: tuple) -> tuple:
            state, guard, rows = carry
            state, guard, metrics = step(state, guard, first + i, hparams)
            return state, guard, jax.tree.map(lambda x, y: x.at[i].set(y), rows, metrics)

        # The buffer is as long as the longest piece; only the first `count` rows are read.
        # The number of updates is traced, so that pieces of any length share one compilation.
        *_, shapes = jax.eval_shape(step, state, guard, first, hparams)
        rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, one_update, (state, guard, rows))

    # A process reads all metrics; one that has some of the seeds needs those of the others.
    shared = NamedSharding(mesh, PartitionSpec()) if mesh and processes.count() > 1 else None
    return (
        jax.jit(init, out_shardings=placed),
        jax.jit(advance, donate_argnums=0, out_shardings=(placed, shared, shared)),
    )


def output_shapes(compiled: Any) -> Any:
    """Returns the shapes, dtypes and placements of what a compiled program returns."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=where, weak_type=x.weak_type
        ),
        compiled.out_info,
        compiled.output_shardings,
    )


def require_memory(num_bytes: int, config: Config, num_seeds: int, *, num_agents: int) -> None:
    """Checks that a training fits its devices, by the compiler's own count.

    Args:
      num_bytes: of the training on one device.
      config: describes the training.
      num_seeds: seeds that are trained together.
      num_agents: agents of an environment.

    Raises:
      ConfigError: it does not fit.
    """
    limit = device_memory.limit(jax.local_devices()[0])
    if limit is None or num_bytes <= limit:
        return
    # In proportion, which is a little too few: networks do not grow with the environments.
    share = int(config.num_envs * limit / num_bytes)
    step = config.num_devices * 8 * num_agents
    fitting = max(share - share % step, config.num_devices * num_agents)
    seeds = ""
    if num_seeds > 1:
        seeds = f", or {max(1, int(num_seeds * limit / num_bytes))} seeds"
    raise ConfigError(
        f"a training must fit the memory of its device; {config.num_envs} environments with "
        f"{config.num_steps} steps need {num_bytes / 2**20:,.0f} MiB of {limit / 2**20:,.0f}. "
        f"About {fitting} environments{seeds} fit: lower num_envs, or num_steps."
    )
