"""Compiles trainings for a TPU that is not there.

`test_accelerators` runs this in a process of its own.

python -m tests.tpu_checks [JSON] prints seconds and memory of each program. Needs libtpu, whose
compiler runs without a device. JAX_PLATFORMS=cpu keeps JAX from looking for one.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks import machine
from ppo_jax import Config, HParams, make_trainer
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.devices import make_mesh, member_sharding, over_members
from tests.test_spaces import CASES, config_of

TOPOLOGY = "v5e:2x2"
KEY = jax.eval_shape(lambda: jax.random.key(0))


def cartpole(**changes):
    fields = {"num_envs": 256, "num_steps": 32, "total_timesteps": 2 * 256 * 32}
    fields["env_params"] = {"max_steps_in_episode": 32}  # some algorithms need whole episodes
    return Config(env="CartPole-v1", **{**fields, **changes})


def compile_for(run, arguments, shardings):
    """Returns the compiled program, and its seconds and memory."""
    lowered = jax.jit(run, in_shardings=shardings).lower(*arguments)
    started = time.perf_counter()
    compiled = lowered.compile()
    return compiled, {
        "compile_seconds": time.perf_counter() - started,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "output_bytes": compiled.memory_analysis().output_size_in_bytes,
    }


def check_one_device(devices):
    """Compiles every algorithm, and every kind of observation, head, network and memory."""
    configs = {name: cartpole(algorithm=name) for name in ALGORITHMS}
    configs |= {case: config_of(case) for case in CASES}
    for name, config in configs.items():
        run = make_trainer(config).run
        _, figures = compile_for(run, (KEY,), SingleDeviceSharding(devices[0]))
        yield {"training": name, "devices": 1, **figures}


def check_shared_environments(devices):
    """Compiles a training whose environments are divided among the devices."""
    mesh = make_mesh(env=len(devices), devices=devices)
    trainer = make_trainer(cartpole(num_devices=len(devices)), mesh)
    program, figures = compile_for(trainer.run, (KEY,), NamedSharding(mesh, PartitionSpec()))
    assert "all-reduce" in program.as_text()
    yield {"training": "ppo, environments divided", "devices": len(devices), **figures}


def check_sweep(devices, num_members=16):
    """Compiles a population whose members are divided among the devices, which exchange nothing."""
    trainer = make_trainer(cartpole())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_members))
    rates = HParams(learning_rate=jax.ShapeDtypeStruct((num_members,), jnp.float32))
    mesh = make_mesh(member=len(devices), devices=devices)
    run = over_members(mesh)(trainer.run, in_axes=(0, 0))
    program, figures = compile_for(run, (keys, rates), member_sharding(mesh))
    text = program.as_text()
    assert not any(f"all-{what}" in text for what in ("reduce", "gather", "to-all"))
    yield {"training": f"ppo, {num_members} members", "devices": len(devices), **figures}


def main(path):
    devices = topologies.get_topology_desc(TOPOLOGY, "tpu").devices
    rows = []
    for check in (check_one_device, check_shared_environments, check_sweep):
        for row in check(devices):
            rows.append({"target": TOPOLOGY, **row})
            print(
                f"| {row['training']} | {row['devices']} | {row['compile_seconds']:.1f} s "
                f"| {row['temporary_bytes'] / 2**20:.1f} MiB |",
                flush=True,
            )
    if path is not None:
        machine.write_results(path, rows)
    print("all checks passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
