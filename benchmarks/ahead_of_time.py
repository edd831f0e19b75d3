"""Counts what a training would do on an accelerator, by compiling for one that is not there.

python benchmarks/ahead_of_time.py --target h100 --workload cartpole-2048 seeds-1024
make accelerators

The compilers of CUDA and of TPUs run without a device; they come with the packages
`jax-cuda12-plugin[with-cuda]` (5 GB, in the version that jax has) and `libtpu`. `make accelerators`
installs them in an environment of its own. For each training the table has the kernels of one
update, in all and by stage, the bytes that they read and write, the memory of the program, and the
collectives among them. Figures of a training on several devices are those of one device.
Peers are those of `peers.py`; their stages cannot be told apart.

The predicted time is that of a model: a kernel takes the largest of a launch, its bytes at the
device's bandwidth, and its arithmetic at the device's rate. Kernels that run at the same time, and
launches that a CUDA graph saves, are not part of the model. The compiler of a TPU estimates the
cycles of most operations, whose time follows from the clock; a stage takes at least its bytes at
the bandwidth. Predictions are not measurements.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import hlo, machine, peers
from benchmarks.workloads import AHEAD_SET, WORKLOADS, Workload

_CONTENDERS = Path(__file__).parent / "contenders"
# JAX must not look for an accelerator, and its CUDA plugin must not check versions of CUDA.
_WITHOUT_DEVICE = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
_PEERS = ("purejaxrl", "rejax")  # others do not run with this version of jax, or without a device
STAGES = ("rollout", "values", "advantages", "shuffle", "minibatches")


class Target(NamedTuple):
    """An accelerator: what its compiler has to know, and rates for the model of time."""

    platform: str
    topology: str
    options: dict[str, str]
    device: hlo.Device


def _gpu(fields: str, name: str, device: hlo.Device) -> Target:
    """Returns a GPU; the fields are those of XLA's GpuTargetConfig."""
    config = (
        f"gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 "
        f"shared_memory_per_block: 49152 threads_per_core_limit: 2048 "
        f"block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
        f"registers_per_core_limit: 65536 registers_per_block_limit: 65536 {fields} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
        f'device_description_str: "{name}"'
    )
    return Target("cuda", "", {"topology": "1x1x4", "target_config": config}, device)


# Rates from the vendors' data sheets: memory bandwidth, and float32 without matrix units, because
# products of these networks are too small for them. A launch takes about 2.5 µs.
TARGETS = {
    "h100": _gpu(
        "shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128 "
        "memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
        "device_memory_size: 84942979072 shared_memory_per_block_optin: 232448 "
        "cuda_compute_capability { major: 9 minor: 0 }",
        "NVIDIA H100 80GB HBM3",
        hlo.Device(3.35e12, 67e12, 2.5e-6),
    ),
    "a100": _gpu(
        "shared_memory_per_core: 167936 core_count: 108 fpus_per_core: 64 "
        "memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 "
        "device_memory_size: 85899345920 shared_memory_per_block_optin: 166912 "
        "cuda_compute_capability { major: 8 minor: 0 }",
        "NVIDIA A100-SXM4-80GB",
        hlo.Device(2.04e12, 19.5e12, 2.5e-6),
    ),
    # Operations of a TPU are steps of one program and launch nothing. The clock follows from the
    # peak rate and four matrix units of 128 x 128 (v5e) and 256 x 256 (v6e).
    "v5e": Target("tpu", "v5e:2x2", {}, hlo.Device(0.82e12, 197e12, 0.0, 1.5e9)),
    "v6e": Target("tpu", "v6e:2x2", {}, hlo.Device(1.64e12, 918e12, 0.0, 1.75e9)),
}


def compile_ahead(
    python: Path, script: str, workload: Workload, target: Target
) -> tuple[dict[str, float], hlo.Program]:
    """Compiles a contender's training in a process of its own.

    Args:
      python: interpreter of the contender's environment.
      script: module in `contenders`.
      workload: the training.
      target: the accelerator.

    Returns:
      Memory and seconds of the compilation, and the program.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "program.txt"
        request = {
            **peers.describe(workload),
            "platform": target.platform,
            "topology": target.topology,
            "options": target.options,
            "text": str(text),
        }
        result = subprocess.run(
            [python, _CONTENDERS / "ahead.py", script],
            input=json.dumps(request) + "\n",
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, **_WITHOUT_DEVICE},
        )
        return json.loads(result.stdout.splitlines()[-1]), hlo.parse(text.read_text())


def lend_compilers(python: Path) -> None:
    """Adds this environment's packages to the path of another one, after its own packages."""
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    (Path(site.strip()) / "compilers.pth").write_text(sysconfig.get_path("purelib") + "\n")


def one_update(program: hlo.Program, num_updates: int) -> str:
    """Returns the name of the body of the loop over updates: the outermost of that length."""
    for loop in hlo.loops(program, program.entry):
        if loop.trip_count == num_updates:
            return loop.called[-1]
    raise ValueError(f"the program has no loop of {num_updates} updates.")


def measure(trainer: str, python: Path, name: str, target_name: str) -> dict[str, Any]:
    """Returns the figures of a workload with one trainer on one target."""
    workload, target = WORKLOADS[name], TARGETS[target_name]
    script = Path(peers.PEERS[trainer].script).stem if trainer in _PEERS else "ours"
    figures, program = compile_ahead(python, script, workload, target)
    body = one_update(program, workload.config.num_updates)
    stages = hlo.work(program, body, target.device, STAGES)
    total = sum(stages.values(), hlo.Work())
    return {
        "trainer": trainer,
        "workload": name,
        "target": target_name,
        **total._asdict(),
        **figures,
        "loops_of_unknown_length": hlo.unknown_loops(program, body),
        "stages": {stage: part._asdict() for stage, part in stages.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the figures as a table in Markdown."""
    lines = [
        "| target | workload | trainer | kernels | " + " | ".join((*STAGES, "other")) + " | "
        "read and written | temporary | collectives | compiled in | predicted |",
        "|---" * (10 + len(STAGES)) + "|",
    ]
    for row in rows:
        stages = [row["stages"].get(stage, {"kernels": 0})["kernels"] for stage in STAGES]
        other = row["stages"]["other"]["kernels"] if any(stages) else 0
        cells = [
            row["target"],
            row["workload"],
            row["trainer"],
            f"{row['kernels']:,.0f}",
            *(f"{count:,.0f}" if count else "–" for count in (*stages, other)),
            f"{row['bytes'] / 2**20:,.0f} MiB",
            f"{row['temporary_bytes'] / 2**20:,.0f} MiB",
            f"{row['collectives']:.0f}",
            f"{row['compile_seconds']:.0f} s",
            f"{row['seconds'] * 1e3:.2f} ms",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", default=["h100"], choices=TARGETS)
    parser.add_argument("--workload", nargs="+", default=list(AHEAD_SET), choices=WORKLOADS)
    peers.add_peer_arguments(parser, _PEERS)
    parser.set_defaults(peer=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pythons = {"ppo_jax": Path(sys.executable), **peers.pythons_of(arguments, parser)}
    for trainer, python in pythons.items():
        if trainer in _PEERS:
            lend_compilers(python)
    rows = []
    for target in arguments.target:
        for name in arguments.workload:
            for trainer, python in pythons.items():
                if peers.takes_part(trainer, name, devices=1):
                    rows.append(measure(trainer, python, name, target))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
                    if arguments.json is not None:
                        machine.write_results(arguments.json, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
