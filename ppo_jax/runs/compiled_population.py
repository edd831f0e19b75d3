"""Members that share a program: compiled once, and run in chunks that fit the devices' memory."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.devices import (
    MEMBER_AXIS,
    member_sharding,
    over_members,
    state_shardings,
    trainings_over_members,
)
from ppo_jax.envs import override_params
from ppo_jax.envs.environment import Environment
from ppo_jax.hparams import HParams
from ppo_jax.policy.policy import Policy
from ppo_jax.population.member import MemberProgram, MemberState, Outcome
from ppo_jax.population.plan import Member
from ppo_jax.runs import device_memory
from ppo_jax.runs.chunk_checkpoints import ChunkCheckpoints
from ppo_jax.runs.kept import made_once
from ppo_jax.runs.pieces import next_size
from ppo_jax.runs.training import output_shapes


class Chunk(NamedTuple):
    """Members that were trained together."""

    members: Sequence[Member]
    outcome: Outcome
    """Results `[S]` in NumPy, in the order of `members`, without the policies."""
    best: int
    """Position in `members` of the highest mean return."""
    best_policy: Policy
    seconds: float
    """Wall time of their training, including the time before a checkpoint was restored."""
    size: int
    """Members that fit the devices together: the size of the next chunk."""


class PieceDone(NamedTuple):
    """Progress within a chunk."""

    updates: int
    """Updates of each member in the piece."""
    seconds: float
    episode_return: float
    """Mean return of the members in the current window of updates; NaN if no episode ended."""


class _Programs(NamedTuple):
    """The three parts of the training of a chunk, compiled for one size."""

    start: Any
    advance: Any
    finish: Any
    num_bytes: int
    """The largest memory of the three on one device."""


def _over_members(member: MemberProgram, mesh: Mesh) -> Any:
    """Returns the functions of a member, over all members of a chunk and jitted."""
    member_map = trainings_over_members(mesh)
    by_member: Any = member_sharding(mesh)
    placed = MemberState(state_shardings(mesh), guard=by_member, curves=by_member)
    advance = member_map(member.advance, in_axes=(0, 0, None, None))
    return MemberProgram(
        jax.jit(member_map(member.start, in_axes=(0, 0, 0)), out_shardings=placed),
        jax.jit(advance, donate_argnums=0, out_shardings=placed),
        jax.jit(over_members(mesh)(member.finish, in_axes=(0, 0))),
    )


class CompiledPopulation:
    """Members that differ in traced values only."""

    def __init__(
        self,
        member: MemberProgram,
        env: Environment,
        *,
        mesh: Mesh,
        num_updates: int,
        may_shrink: bool,
        say: Callable[[str], None],
    ) -> None:
        """Prepares the programs; nothing is compiled yet.

        Args:
          member: the training of one member.
          env: has the default parameters that members change.
          mesh: the devices. Its axis `member` divides the members.
          num_updates: updates of a member.
          may_shrink: reduce a chunk that does not fit by the compiler's own count. Running out of
            memory leads to a smaller chunk in any case.
          say: takes lines about memory.
        """
        self.compile_seconds = 0.0
        self._env = env
        self._num_updates = num_updates
        self._may_shrink = may_shrink
        self._say = say
        self._mesh = mesh
        self._functions = made_once(
            member, ("population", id(member), mesh), lambda: _over_members(member, mesh)
        )
        self._compiled: dict[int, _Programs] = {}

    def chunks(
        self,
        members: Sequence[Member],
        size: int,
        *,
        is_stopped: Callable[[], bool],
        on_piece: Callable[[int, PieceDone], None],
        checkpoints: ChunkCheckpoints | None = None,
    ) -> Iterator[Chunk]:
        """Trains members, at most `size` of them together, and yields each chunk.

        Args:
          members: in the order in which they are trained.
          size: members that are trained together.
          is_stopped: whether to stop. It is asked after each piece, which takes about a second; a
            chunk that was stopped is not yielded.
          on_piece: `(num_members, piece)`, called after each piece, and once for the updates of a
            restored checkpoint.
          checkpoints: checkpoints of the chunk that is running; None writes none.
        """
        size = self._rounded_up(size)
        while members and not is_stopped():
            size = self._fitting_size(members, size)
            try:
                chunk = self._run(
                    members[:size], size, is_stopped, on_piece, checkpoints=checkpoints
                )
            except jax.errors.JaxRuntimeError as error:
                # The compiler's count is an estimate, and other processes use the device as well.
                if not device_memory.is_exhausted(error) or size <= self._mesh.shape[MEMBER_AXIS]:
                    raise
                size = self._smaller(size, size // 2)
                continue
            if chunk is None:
                return
            members = members[size:]
            yield chunk

    def _run(
        self,
        members: Sequence[Member],
        size: int,
        is_stopped: Callable[[], bool],
        on_piece: Callable[[int, PieceDone], None],
        *,
        checkpoints: ChunkCheckpoints | None,
    ) -> Chunk | None:
        """Trains one chunk in pieces of about a second; None if it was stopped."""
        programs = self._compiled[size]
        keys, hparams, env_params = self._arguments(members, size)
        start = time.perf_counter()
        label = {"size": size, "members": [member.number for member in members]}
        found = None
        if checkpoints is not None:
            found = checkpoints.restore(label, lambda _: output_shapes(programs.start))
        if found is None:
            state, done = programs.start(keys, hparams, env_params), 0
        else:
            state, done = found[0], found[1]["done"]
            start -= found[1].get("seconds", 0.0)  # checkpoints of version 0.1 lack it
            self._say(f"continuing {len(members)} members after {done} updates")
            on_piece(len(members), PieceDone(done, time.perf_counter() - start, math.nan))
        count = 1
        while done < self._num_updates:
            piece_started = time.perf_counter()
            count = min(count, self._num_updates - done)
            state = programs.advance(state, hparams, np.int32(done), np.int32(count))
            episode_return = _current_return(state, (done + count - 1) / self._num_updates)
            seconds = time.perf_counter() - piece_started
            done += count
            on_piece(len(members), PieceDone(count, seconds, episode_return))
            stopped = is_stopped()
            if checkpoints is not None and (stopped or checkpoints.is_due):
                record = {**label, "done": done, "seconds": time.perf_counter() - start}
                checkpoints.save(done, state, record)
            if stopped:
                return None
            count = next_size(count, seconds)
        outcome = programs.finish(state, keys)
        policies = outcome.policy
        outcome = jax.device_get(outcome._replace(policy=None))
        outcome = jax.tree.map(lambda x: x[: len(members)], outcome)
        best = best_of(outcome.returns.mean(axis=1))
        # One policy leaves the device; those of all members may be too large for the host.
        best_policy = jax.tree.map(lambda x: x[best], policies)
        seconds = time.perf_counter() - start
        return Chunk(members, outcome, best, jax.device_get(best_policy), seconds, size)

    def _fitting_size(self, members: Sequence[Member], size: int) -> int:
        """Compiles a program for `size` members, or for fewer that fit; returns their number."""
        while True:
            num_bytes = self._compile(members, size)
            limit = device_memory.limit(self._mesh.devices.flat[0])
            if limit is None or num_bytes <= limit:
                return size
            if not self._may_shrink or size <= self._mesh.shape[MEMBER_AXIS]:
                return size
            size = self._smaller(size, int(size * limit / num_bytes))

    def _compile(self, members: Sequence[Member], size: int) -> int:
        """Compiles the programs for chunks of `size`, once; returns the bytes of the largest."""
        if size not in self._compiled:
            started = time.perf_counter()
            keys, hparams, env_params = self._arguments(members[:size], size)
            start = self._functions.start.lower(keys, hparams, env_params)
            state = start.out_info
            number = np.int32(0)
            advance = self._functions.advance.lower(state, hparams, number, number).compile()
            parts = (start.compile(), advance, self._functions.finish.lower(state, keys).compile())
            programs = _Programs(*parts, num_bytes=max(map(device_memory.num_bytes, parts)))
            self._compiled[size] = programs
            self.compile_seconds += time.perf_counter() - started
            megabytes = programs.num_bytes / 2**20
            self._say(f"{size} members together take {megabytes:,.0f} MiB per device")
        return self._compiled[size].num_bytes

    def _smaller(self, size: int, target: int) -> int:
        """Returns a size of at most `target` that is below `size` where that is possible."""
        count = self._mesh.shape[MEMBER_AXIS]
        smaller = max(1, min(target, size - 1) // count) * count
        self._say(f"{size} members do not fit the memory; continuing with {smaller} at a time")
        return smaller

    def _rounded_up(self, size: int) -> int:
        """Returns the size with a whole number of members for each device."""
        count = self._mesh.shape[MEMBER_AXIS]
        return max(1, math.ceil(size / count)) * count

    def _arguments(self, members: Sequence[Member], size: int) -> tuple[jax.Array, HParams, Any]:
        """Stacks the arguments of members; the last one is repeated up to `size`."""
        # A program has a fixed number of lanes; results of the extra lanes are dropped.
        padded = [*members, *[members[-1]] * (size - len(members))]
        keys = jax.vmap(jax.random.key)(np.array([member.seed for member in padded]))
        hparams = _stacked([jax.tree.map(np.float32, member.hparams) for member in padded])
        # Cast to the dtypes of the defaults, so that the values 9 and 9.8 share one program.
        dtypes = jax.tree.map(jnp.result_type, self._env.params)
        env_params = _stacked(
            [
                jax.tree.map(
                    np.asarray,
                    override_params(self._env.name, self._env.params, member.env_params),
                    dtypes,
                )
                for member in padded
            ]
        )
        return keys, hparams, env_params


def best_of(scores: np.ndarray, ties: np.ndarray | None = None) -> int:
    """Returns the index of the highest score; a NaN is the lowest.

    Args:
      scores: `[S]`.
      ties: `[S]`, decides between equal scores; None, or equal ties, for the first of them.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ties = np.zeros(len(scores)) if ties is None else ties
    return int(np.lexsort((np.arange(len(scores)), -ties, -scores))[0])


def _current_return(state: MemberState, progress: float) -> float:
    """Returns the mean return over members in the window of updates that contains `progress`."""
    totals, counts = jax.device_get(
        (state.curves.totals["episode/return"], state.curves.num_episodes)
    )
    row = int(progress * totals.shape[1])
    returns = totals[:, row][counts[:, row] > 0] / counts[:, row][counts[:, row] > 0]
    return float(returns.mean()) if returns.size else float("nan")


def _stacked(trees: Sequence[Any]) -> Any:
    def stack(*leaves: Any) -> np.ndarray:
        return np.stack([np.asarray(leaf, jnp.result_type(leaf)) for leaf in leaves])

    return jax.tree.map(stack, *trees)
