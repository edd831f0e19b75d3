"""The loop of a sweep: plans of groups become compiled populations, and chunks become tables."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from ppo_jax.devices import MEMBER_AXIS, make_mesh
from ppo_jax.envs import override_params
from ppo_jax.population.member import make_member
from ppo_jax.population.plan import Group, Member
from ppo_jax.runs.compiled_population import CompiledPopulation, PieceDone
from ppo_jax.runs.kept import made_once, trainer_of
from ppo_jax.runs.progress import TrainingProgress
from ppo_jax.runs.sink import Rows
from ppo_jax.runs.sinks import member_rows
from ppo_jax.runs.sweep_store import SweepStore
from ppo_jax.runs.sweep_tables import make_tables
from ppo_jax.trainer import Trainer

_LARGEST_CHUNK = 1024


class PlannedGroup(NamedTuple):
    """A group of members with the trainer and the devices that train them."""

    group: Group
    trainer: Trainer
    mesh: Mesh


class SweepRunner:
    """Runs plans, one after another. Programs that were compiled for one plan serve the next."""

    def __init__(
        self,
        *,
        num_rows: int,
        num_episodes: int,
        chunk: int | None,
        same_bits: bool,
        say: Callable[[str], None],
        bar: TrainingProgress,
        is_stopped: Callable[[], bool],
        on_rows: Callable[[Rows], None],
    ) -> None:
        """Prepares an empty runner.

        Args:
          num_rows: rows of each member's curve.
          num_episodes: episodes of each member's final evaluation.
          chunk: members that are trained together; None for as many as fit.
          same_bits: use chunks whose results do not depend, to the last bit, on where a sweep was
            interrupted.
          say: takes lines about what will be done.
          bar: shows the progress.
          is_stopped: whether to stop after the piece that is running, which takes about a second.
          on_rows: takes the rows of members that are finished.
        """
        self._on_rows = on_rows
        self._num_rows, self._num_episodes, self._chunk = num_rows, num_episodes, chunk
        self._say, self._bar, self._is_stopped = say, bar, is_stopped
        self._same_bits = same_bits
        self._populations: dict[Any, CompiledPopulation] = {}
        self._chunk_sizes: dict[Any, int] = {}
        self.run_seconds = 0.0

    @property
    def compile_seconds(self) -> float:
        """Seconds that were spent on compiling."""
        return sum(population.compile_seconds for population in self._populations.values())

    def run(self, plan: Sequence[PlannedGroup], store: SweepStore) -> None:
        """Trains the members that the store does not have, until the runner is stopped."""
        finished = store.finished()
        todo = [
            (planned, [m for m in planned.group.members if m.number not in finished])
            for planned in plan
        ]
        # Announced beforehand, because compiling is most of the time of a small sweep.
        new = {planned.group.program for planned, waiting in todo if waiting}
        new -= set(self._populations)
        self._bar.start(
            sum(_member_timesteps(planned.group) * len(waiting) for planned, waiting in todo)
        )
        self._say(_announcement(todo, num_compilations=len(new)))
        for planned, waiting in todo:
            if waiting and not self._is_stopped():
                self._run_group(planned, waiting, store)

    def _run_group(
        self, planned: PlannedGroup, waiting: Sequence[Member], store: SweepStore
    ) -> None:
        group = planned.group
        program = group.program
        # A group's program depends on its structure, not on its values: batches of an adaptive
        # sampler share it.
        if program not in self._populations:
            self._populations[program] = self._make_population(planned)
            # Chunks of one size are one program, and give the same bits. If `chunk` is given, a
            # shard uses the same chunk size as the whole sweep.
            size = len(group.members) if self._chunk is None else group.size
            # A single member a device is compiled without batched kernels and rounds differently.
            smallest = 2 * planned.mesh.shape[MEMBER_AXIS] if self._same_bits else 1
            self._chunk_sizes[program] = min(self._chunk or _LARGEST_CHUNK, max(size, smallest))
        batch_size = group.config.batch_size

        def on_piece(num_members: int, piece: PieceDone) -> None:
            steps = piece.updates * batch_size * num_members
            rate = steps / piece.seconds
            self._bar.advance(steps, steps_per_second=rate, episode_return=piece.episode_return)

        chunks = self._populations[program].chunks(
            waiting,
            self._chunk_sizes[program],
            is_stopped=self._is_stopped,
            on_piece=on_piece,
            checkpoints=store.checkpoints,
        )
        for chunk in chunks:
            self._chunk_sizes[program] = chunk.size
            # The best policy first: members on disk are not trained again.
            best = chunk.members[chunk.best]
            score = float(chunk.outcome.returns[chunk.best].mean())
            store.offer_policy(chunk.best_policy, score, member=best, config=group.config)
            tables = make_tables(group.config, chunk.members, chunk.outcome)
            store.add(tables)
            self._on_rows(member_rows(tables, chunk.seconds))
            self.run_seconds += chunk.seconds

    def _make_population(self, planned: PlannedGroup) -> CompiledPopulation:
        config = planned.group.config
        num_updates = config.num_updates
        num_rows = min(self._num_rows, num_updates)
        member = made_once(
            planned.trainer,
            ("member", num_rows, self._num_episodes),
            lambda: make_member(
                planned.trainer,
                max_skipped_updates=config.max_skipped_updates,
                num_updates=num_updates,
                num_rows=num_rows,
                num_episodes=self._num_episodes,
            ),
        )
        return CompiledPopulation(
            member,
            planned.trainer.env,
            mesh=planned.mesh,
            num_updates=num_updates,
            may_shrink=self._chunk is None,
            say=self._say,
        )


def plan_group(group: Group, member_devices: int | None) -> PlannedGroup:
    """Returns a group with its trainer and its devices.

    The trainer is built for the longest episodes of the members: some algorithms require that a
    rollout holds a whole episode.

    Args:
      group: the members.
      member_devices: see `sweep`.

    Raises:
      ConfigError: a setting breaks a rule, or there are too few devices.
    """
    config, name = group.config, "max_steps_in_episode"
    limits = [m.env_params[name] for m in group.members if name in m.env_params]
    if limits:
        config = config.replace(env_params={**dict(config.env_params), name: max(limits)})
    if config.num_devices == 1:
        trainer = trainer_of(config)  # its errors come before a backend is started
    if member_devices is None:
        member_devices = max(1, jax.device_count() // config.num_devices)
    mesh = make_mesh(env=config.num_devices, member=member_devices)
    if config.num_devices > 1:
        trainer = trainer_of(config, mesh)
    for member in group.members:  # a misspelt parameter is an error before anything is written
        override_params(trainer.env.name, trainer.env.params, member.env_params)
    return PlannedGroup(group, trainer, mesh)


def _member_timesteps(group: Group) -> int:
    """Returns the environment steps of one member."""
    return group.config.num_updates * group.config.batch_size


def _announcement(
    todo: Sequence[tuple[PlannedGroup, Sequence[Member]]], *, num_compilations: int
) -> str:
    num_members = sum(len(planned.group.members) for planned, _ in todo)
    num_done = num_members - sum(len(waiting) for _, waiting in todo)
    steps = sum(_member_timesteps(planned.group) * len(waiting) for planned, waiting in todo)
    return (
        f"{num_members} members in {len(todo)} group{'s' * (len(todo) > 1)}"
        f"{f', {num_done} of them done already' if num_done else ''}: "
        f"{num_compilations} compilation{'s' * (num_compilations != 1)}, {steps:,} steps to go"
    )
