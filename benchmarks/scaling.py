"""Measures and counts what it costs to share the environments of a training among devices.

python benchmarks/scaling.py devices --json benchmarks/results/scaling-devices-cpu.json
python benchmarks/scaling.py processes --json benchmarks/results/scaling-processes-cpu.json
python benchmarks/scaling.py ahead --target h100 v5e --json benchmarks/results/scaling-ahead.json

`devices` trains on 1, 2, 4 and 8 devices of one CPU, `processes` on one device in each of 1, 2 and
4 processes. Weak scaling gives each device as many environments as one device has alone. Strong
scaling divides a fixed number of environments among the devices. With more devices than cores, the
counts are valid but the times are not. `ahead` compiles for accelerators that are not attached, in
the environment of `make accelerators`, and predicts the time of an update by the model that
`docs/machines.md` describes.
"""

import argparse
import itertools
import json
import math
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import ahead_of_time, hlo, machine
from benchmarks.workloads import Workload
from ppo_jax import Config, make_mesh, make_trainer

NUM_DEVICES = (1, 2, 4, 8)
NUM_PROCESSES = (1, 2, 4)
ENVS_OF_A_DEVICE = 1024
AHEAD_ENVS = (256, 2048, 16384)
UPDATES = 10
# Assumptions of the model, for an all-reduce of few bytes: seconds on one host, and more for every
# doubling of the hosts; bytes per second of a device's links on its host, and between hosts.
LINKS = {
    "h100": (20e-6, 5e-6, 450e9, 50e9),
    "a100": (20e-6, 5e-6, 300e9, 25e9),
    "v5e": (5e-6, 2e-6, 200e9, 200e9),
    "v6e": (5e-6, 2e-6, 400e9, 400e9),
}


def config_of(num_envs: int, num_devices: int, num_steps: int = 32) -> Config:
    """Returns CartPole with the usual networks."""
    return Config(
        env="CartPole-v1",
        num_envs=num_envs,
        num_steps=num_steps,
        num_devices=num_devices,
        num_epochs=4,
        num_minibatches=4,
        hidden_sizes=(64, 64),
        total_timesteps=UPDATES * num_envs * num_steps,
    )


def compiled(config: Config) -> Any:
    """Compiles the whole training on as many devices as its config says."""
    mesh = make_mesh(env=config.num_devices)
    return jax.jit(make_trainer(config, mesh).run).lower(jax.random.key(0)).compile()


def counts(text: str, target: hlo.Device) -> hlo.Work:
    """Returns the work of one update on one device."""
    program = hlo.parse(text)
    body = ahead_of_time.one_update(program, UPDATES)
    return sum(hlo.work(program, body, target, ()).values(), hlo.Work())


def seconds_of(program: Any, repeats: int) -> list[float]:
    """Returns the seconds of runs with different seeds; the first run warms up and is left out."""
    taken = []
    for seed in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(jax.random.key(seed)))
        taken.append(time.perf_counter() - start)
    return taken[1:]


def sizes(scaling: str, count: int, largest: int) -> int:
    """Returns the environments of a training on so many devices."""
    return ENVS_OF_A_DEVICE * (count if scaling == "weak" else largest)


def row_of(scaling: str, config: Config, taken: list[float], work: hlo.Work) -> dict[str, Any]:
    """Returns the figures of one training."""
    steps = config.num_updates * config.batch_size
    return {
        "scaling": scaling,
        "devices": config.num_devices,
        "num_envs": config.num_envs,
        "steps_per_second": steps / statistics.median(taken),
        "seconds": taken,
        "collectives": work.collectives,
        "collective_bytes": work.collective_bytes,
    }


def on_devices(repeats: int) -> list[dict[str, Any]]:
    """Measures trainings on the devices of this process, interleaved."""
    jax.config.update("jax_num_cpu_devices", max(NUM_DEVICES))
    largest = max(NUM_DEVICES)
    trainings = [
        (scaling, config_of(sizes(scaling, count, largest), count))
        for scaling in ("weak", "strong")
        for count in NUM_DEVICES
    ]
    programs = [compiled(config) for _, config in trainings]
    runs: list[list[float]] = [[] for _ in programs]
    for _ in range(repeats):
        for taken, program in zip(runs, programs, strict=True):
            taken += seconds_of(program, 1)
    device = hlo.Device(1.0, 1.0, 1.0)
    return [
        row_of(scaling, config, taken, counts(program.as_text(), device))
        for (scaling, config), taken, program in zip(trainings, runs, programs, strict=True)
    ]


def in_process(coordinator: str, index: int, count: int, num_envs: int, repeats: int) -> None:
    """Measures a training as one of several processes; the first prints the seconds."""
    jax.distributed.initialize(coordinator, count, index)
    program = compiled(config_of(num_envs, count))
    taken = seconds_of(program, repeats)
    if index == 0:
        work = counts(program.as_text(), hlo.Device(1.0, 1.0, 1.0))
        print(json.dumps([taken, work]))


def in_processes(repeats: int) -> list[dict[str, Any]]:
    """Measures trainings of several processes, each with one device."""
    rows = []
    for scaling in ("weak", "strong"):
        for count in NUM_PROCESSES:
            num_envs = sizes(scaling, count, max(NUM_PROCESSES))
            with socket.socket() as free:
                free.bind(("localhost", 0))
                coordinator = f"localhost:{free.getsockname()[1]}"
            own = [coordinator, str(count), str(num_envs), str(repeats)]
            started = [
                subprocess.Popen(
                    [sys.executable, __file__, "process", "--one-of", str(index), *own],
                    stdout=subprocess.PIPE,
                    text=True,
                )
                for index in range(count)
            ]
            outputs = [process.communicate()[0] for process in started]
            taken, work = json.loads(outputs[0].splitlines()[-1])
            rows.append(row_of(scaling, config_of(num_envs, count), taken, hlo.Work(*work)))
    return rows


def ahead(target_name: str) -> list[dict[str, Any]]:
    """Predicts updates on several accelerators, from the program that each of them runs."""
    target = ahead_of_time.TARGETS[target_name]
    # Devices that a program is compiled for, with the numbers of devices that it stands for.
    is_tpu = target.platform == "tpu"
    plans = {4: (target.topology, (4,) if is_tpu else (8, 256))}
    if is_tpu:
        plans[16] = (f"{target_name}:4x4", (16, 256))
    rows = []
    for num_envs, (compiled_for, (topology, numbers)) in itertools.product(
        AHEAD_ENVS, plans.items()
    ):
        config = config_of(num_envs * compiled_for, compiled_for, num_steps=128)
        workload = Workload(f"CartPole-v1, {num_envs} x 128 a device", config)
        figures, program = ahead_of_time.compile_ahead(
            Path(sys.executable), "ours", workload, target._replace(topology=topology)
        )
        body = ahead_of_time.one_update(program, config.num_updates)
        work = sum(hlo.work(program, body, target.device, ()).values(), hlo.Work())
        for count in numbers:
            seconds = predicted_seconds(work, target_name, count)
            rows.append(
                {
                    "target": target_name,
                    "envs_of_a_device": num_envs,
                    "compiled_for": compiled_for,
                    "devices": count,
                    **figures,
                    **work._asdict(),
                    "predicted_seconds": seconds,
                    "efficiency": work.seconds / seconds,
                    "steps_per_second": num_envs * 128 * count / seconds,
                }
            )
    return rows


def predicted_seconds(work: hlo.Work, target_name: str, num_devices: int) -> float:
    """Returns the predicted seconds of an update on `num_devices` devices, with collectives.

    An all-reduce takes its latency, and twice its bytes over the slowest link of its ring or tree.
    """
    latency, of_a_doubling, bandwidth, between_hosts = LINKS[target_name]
    hosts = math.ceil(num_devices / 8)
    latency += of_a_doubling * math.log2(hosts)
    link = bandwidth if hosts == 1 else between_hosts
    return work.seconds + work.collectives * latency + 2 * work.collective_bytes / link


def table(rows: list[dict[str, Any]]) -> str:
    """Returns measured figures as a table in Markdown."""
    lines = [
        "| scaling | devices | environments | steps/s | of one device | collectives | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        alone = next(x for x in rows if x["scaling"] == row["scaling"] and x["devices"] == 1)
        lines.append(
            f"| {row['scaling']} | {row['devices']} | {row['num_envs']:,} "
            f"| {row['steps_per_second']:,.0f} "
            f"| {row['steps_per_second'] / alone['steps_per_second']:.2f} "
            f"| {row['collectives']:.0f} | {row['collective_bytes'] / 1024:,.0f} KiB |"
        )
    return "\n".join(lines)


def predictions(rows: list[dict[str, Any]]) -> str:
    """Returns predicted figures as a table in Markdown."""
    lines = [
        "| target | devices | environments a device | collectives | bytes | update without them "
        "| update | efficiency | steps/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['target']} | {row['devices']} | {row['envs_of_a_device']:,} "
            f"| {row['collectives']:.0f} "
            f"| {row['collective_bytes'] / 1024:,.0f} KiB | {row['seconds'] * 1e3:.2f} ms "
            f"| {row['predicted_seconds'] * 1e3:.2f} ms | {row['efficiency']:.0%} "
            f"| {row['steps_per_second'] / 1e6:,.0f} M |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("devices", "processes", "ahead", "process"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--target", nargs="+", default=["h100", "v5e"], choices=LINKS)
    parser.add_argument("--one-of", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if arguments.what == "process":
        index, coordinator, count, num_envs, repeats = arguments.one_of
        in_process(coordinator, int(index), int(count), int(num_envs), int(repeats))
        return
    if arguments.what == "ahead":
        rows = [row for target in arguments.target for row in ahead(target)]
        print(predictions(rows))
    else:
        measure = on_devices if arguments.what == "devices" else in_processes
        rows = measure(arguments.repeats)
        print(table(rows))
    if arguments.json:
        machine.write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
