"""Members that share a program: compiled once, and run in chunks that fit the devices' memory."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.devices import member_sharding
from ppo_jax.envs import override_params
from ppo_jax.envs.environment import Environment
from ppo_jax.hparams import HParams
from ppo_jax.population.member import Outcome
from ppo_jax.population.plan import Member

_MEMORY_SHARE = 0.8  # of a device's memory; the runtime needs the rest


class Chunk(NamedTuple):
    """Members that were trained together."""

    members: Sequence[Member]
    outcome: Outcome
    """Results `[S]`, in the order of `members`."""
    seconds: float
    size: int
    """Members that fit the devices together: the size of the next chunk."""


class CompiledPopulation:
    """Members that differ in traced values only."""

    def __init__(
        self,
        train: Callable[..., Outcome],
        env: Environment,
        *,
        may_shrink: bool,
        say: Callable[[str], None],
    ) -> None:
        """Prepares the program; nothing is compiled yet.

        Args:
          train: `(key, hparams, env_params) -> Outcome` of one member.
          env: has the default parameters that members change.
          may_shrink: reduce a chunk that does not fit by the compiler's own count. Running out of
            memory leads to a smaller chunk in any case.
          say: takes lines about memory.
        """
        self.compile_seconds = 0.0
        self._env = env
        self._may_shrink = may_shrink
        self._say = say
        self._devices = jax.devices()
        sharding = member_sharding(len(self._devices))
        # Each device runs its own loops. Under `vmap` alone, the evaluation would exchange among
        # all devices, at every step, whether the last episode has ended.
        sharded = jax.shard_map(
            jax.vmap(train),
            mesh=sharding.mesh,
            in_specs=sharding.spec,
            out_specs=sharding.spec,
            check_vma=False,
        )
        self._program = jax.jit(sharded, in_shardings=sharding, out_shardings=sharding)
        self._compiled: dict[int, Any] = {}

    def chunks(self, members: Sequence[Member], size: int) -> Iterator[Chunk]:
        """Trains members, at most `size` of them together, and yields each chunk."""
        size = self._rounded_up(size)
        while members:
            size = self._fitting_size(members, size)
            chunk = members[:size]
            try:
                start = time.perf_counter()
                outcome = jax.device_get(self._compiled[size](*self._arguments(chunk, size)))
                seconds = time.perf_counter() - start
            # The compiler's count is an estimate, and other processes use the device as well.
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or size <= len(self._devices):
                    raise
                size = self._smaller(size, size // 2)
                continue
            members = members[len(chunk) :]
            yield Chunk(chunk, _first(len(chunk), outcome), seconds, size)

    def _fitting_size(self, members: Sequence[Member], size: int) -> int:
        """Compiles a program for `size` members, or for fewer that fit; returns their number."""
        while True:
            num_bytes = self._compile(members, size)
            limit = _memory_limit(self._devices[0])
            if limit is None or num_bytes <= limit:
                return size
            if not self._may_shrink or size <= len(self._devices):
                return size
            size = self._smaller(size, int(size * limit / num_bytes))

    def _compile(self, members: Sequence[Member], size: int) -> int:
        """Compiles the program for chunks of `size`, once; returns the bytes that it takes."""
        if size not in self._compiled:
            start = time.perf_counter()
            lowered = self._program.lower(*self._arguments(members[:size], size))
            self._compiled[size] = lowered.compile()
            self.compile_seconds += time.perf_counter() - start
            megabytes = _num_bytes(self._compiled[size]) / 2**20
            self._say(f"{size} members at once take {megabytes:,.0f} MiB a device")
        return _num_bytes(self._compiled[size])

    def _smaller(self, size: int, target: int) -> int:
        """Returns a size of at most `target` that is below `size` where that is possible."""
        count = len(self._devices)
        smaller = max(1, min(target, size - 1) // count) * count
        self._say(f"that does not fit; going on with {smaller} members at once")
        return smaller

    def _rounded_up(self, size: int) -> int:
        """Returns the size with a whole number of members for each device."""
        count = len(self._devices)
        return max(1, math.ceil(size / count)) * count

    def _arguments(self, members: Sequence[Member], size: int) -> tuple[jax.Array, HParams, Any]:
        """Stacks the arguments of members; the last one is repeated up to `size`."""
        # A program has a fixed number of lanes; results of the extra lanes are dropped.
        padded = [*members, *[members[-1]] * (size - len(members))]
        keys = jax.vmap(jax.random.key)(np.array([member.seed for member in padded]))
        hparams = _stacked([jax.tree.map(np.float32, member.hparams) for member in padded])
        # In the dtypes of the defaults, so that 9 and 9.8 are one program.
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


def _first(count: int, outcome: Outcome) -> Outcome:
    """Drops the lanes that fill up a chunk."""
    return jax.tree.map(lambda x: x[:count], outcome)


def _stacked(trees: Sequence[Any]) -> Any:
    def stack(*leaves: Any) -> np.ndarray:
        return np.stack([np.asarray(leaf, jnp.result_type(leaf)) for leaf in leaves])

    return jax.tree.map(stack, *trees)


def _num_bytes(compiled: Any) -> int:
    """Returns the memory that a program takes on a device; 0 where the compiler does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def _memory_limit(device: jax.Device) -> float | None:
    """Returns the bytes that a program may take; None where they are unknown."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return _MEMORY_SHARE * stats["bytes_limit"]
    if device.platform == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return _MEMORY_SHARE * total / len(jax.devices())
    return None
