"""A policy as StableHLO, by `jax.export`. JAX releases of the following six months can run it."""

from typing import Any

import jax
from jax import export

from ppo_jax.export.acting import make_act, obs_shapes, state_shapes
from ppo_jax.policy.policy import Policy

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(policy: Policy) -> bytes:
    """Returns the serialised program of a policy, for CPUs, NVIDIA GPUs and TPUs at once.

    `jax.export.deserialize(content).call(obs)` runs it, with any number of observations
    `[B, ...]`. It returns what `acting.Act` does.
    """
    # A symbolic size: one program serves every number of observations.
    (batch,) = export.symbolic_shape("b")
    arguments: list[Any] = [obs_shapes(policy, batch)]
    if policy.spec.memory is not None:
        arguments.append(state_shapes(policy, batch))
    program = export.export(jax.jit(make_act(policy)), platforms=PLATFORMS)(*arguments)
    return bytes(program.serialize())
