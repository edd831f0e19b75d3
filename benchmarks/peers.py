r"""Compares ppo_jax with other trainers on the same work, one run of each in turn.

python benchmarks/peers.py --devices 2 --purejaxrl path/to/purejaxrl \
    --json benchmarks/results/peers-cpu.json

Each peer has a virtual environment, which is made from the package index the first time, and one
process for all of its runs. Runs are interleaved, so that a machine whose speed drifts slows all
trainers equally. PureJaxRL is not a package; pass a checkout.

All trainers get the same hyperparameters by name. ppo_jax is set to the meaning that rejax gives
them: it clips the entries of a gradient and not its norm, and initialises weights and optimiser
differently (`contenders/ours.py`). The peak memory of a process is read after its first training,
and includes compilation.

The return is that of the trained policy, sampled, over 64 episodes. PureJaxRL does not return its
policy, so that its return is that of the episodes that ended in the last update. brax's trainer has
no return, because it continues from run to run. ± is the standard error of the mean over runs.
Learning rates are constant, because rejax cannot anneal them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from benchmarks.workloads import CPU_SET, WORKLOADS, Workload
from ppo_jax.resolve import complete_hparams

_CONTENDERS = Path(__file__).parent / "contenders"
_JAX = ("jax>=0.10,<0.11", "gymnax==0.0.9")  # the last gymnax with the API that peers use

_ON_ONE_DEVICE = {name: work for name, work in WORKLOADS.items() if work.config.num_devices == 1}
_WITHOUT_MEMORY = tuple(name for name, work in _ON_ONE_DEVICE.items() if work.config.memory is None)
_OF_PUREJAXRL = tuple(
    name
    for name, work in _ON_ONE_DEVICE.items()
    if not work.config.env.startswith("brax:") and work.config.memory in (None, "gru")
)
_BRAX = "brax>=0.14,<0.15"

_BASELINES = ("stable-baselines3>=2.9,<3", "sbx-rl>=0.28", "gymnasium[mujoco]")


class Peer(NamedTuple):
    """Another trainer: its requirements, and the script that runs it."""

    requirements: tuple[str, ...]
    script: str
    environment: str
    """Name of its virtual environment, which several peers may share."""
    workloads: tuple[str, ...] = _WITHOUT_MEMORY
    """Workloads that it can run in minutes."""


PEERS = {
    "purejaxrl": Peer(
        (*_JAX, "distrax", "flax", "optax"), "purejaxrl.py", "gymnax-0.0", _OF_PUREJAXRL
    ),
    "rejax": Peer((*_JAX, "rejax==0.1.3", _BRAX), "rejax_ppo.py", "rejax"),
    # It calls functions that jax 0.10 has removed.
    "brax": Peer(("jax>=0.9,<0.10", _BRAX), "brax_ppo.py", "brax", ("W6",)),
    "sb3": Peer(_BASELINES, "stable_baselines3_ppo.py", "sb3", ("W1",)),
    "sbx": Peer(_BASELINES, "sbx_ppo.py", "sb3", ("W1",)),
}

# Of `benchmarks/host.py`. The scripts need gymnasium 0.29, and the interface that EnvPool had
# before 1.0.
CLEANRL = Peer(
    (
        "gymnasium==0.29.1",
        "gym==0.23.1",
        "envpool==0.8.4",
        "mujoco==2.3.3",
        "imageio",
        "numpy<2",
        "torch",
        "tensorboard",
        "tyro",
        "setuptools<66",
    ),
    "cleanrl.py",
    "cleanrl",
    (),
)


class Contender:
    """A process that compiles one workload, and then runs it when asked."""

    def __init__(self, python: Path, script: str, workload: dict[str, Any], devices: int) -> None:
        self.process = subprocess.Popen(
            [python, _CONTENDERS / script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Processes that share a GPU must not each reserve most of its memory.
            env={
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                **os.environ,
                "JAX_NUM_CPU_DEVICES": str(devices),
            },
        )
        self.figures: dict[str, Any] = {}
        self.warm_up: dict[str, Any] = {}
        self._send(workload)

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends one line and waits for the answer."""
        self._send(message)
        return self._answer()

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args!r} ended; its output is above.")
        return json.loads(answer)

    @staticmethod
    def prepare(contenders: Iterable["Contender"]) -> None:
        """Waits until all have compiled their workloads, and have run them once."""
        contenders = list(contenders)
        for contender in contenders:
            contender.figures = contender._answer()
            contender._send({"seed": 0})
        for contender in contenders:
            contender.warm_up = contender._answer()

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


def describe(workload: Workload) -> dict[str, Any]:
    """Returns a workload as plain data, with the hyperparameters of all contenders."""
    config = workload.config
    names = ("env", "num_envs", "num_steps", "total_timesteps", "num_epochs", "num_minibatches")
    used = ("learning_rate", "gamma", "gae_lambda", "clip_eps", "ent_coef", "vf_coef")
    hparams = complete_hparams(None, config)
    return {
        **{name: getattr(config, name) for name in names},
        "env_kwargs": dict(config.env_kwargs),
        "num_seeds": workload.num_seeds,
        "memory": config.memory,
        "shared_torso": config.shared_torso,
        "num_devices": config.num_devices,
        "continuous": config.env == "Pendulum-v1",
        "hparams": {
            **{name: getattr(hparams, name) for name in (*used, "max_grad_norm")},
            "value_clip_eps": hparams.clip_eps,  # as PureJaxRL and rejax do
        },
    }


_ONE_DEVICE = "ppo_jax, one device"


def devices_for(peer: str, workload: Workload, devices: int) -> int:
    """Returns the number of devices that a trainer uses for a workload.

    Every trainer can divide seeds among all devices. Only ppo_jax and brax can divide the
    environments of a single training, unless its minibatches are too small to be worth a
    collective.
    """
    config = workload.config
    if workload.num_seeds is not None:
        return devices
    minibatch = config.batch_size // (config.num_minibatches or 1)
    return devices if peer in ("ppo_jax", "brax") and minibatch // devices >= 256 else 1


def takes_part(peer: str, name: str, devices: int) -> bool:
    """Returns whether a contender runs a workload.

    ppo_jax runs it on one device as well where it can use several.
    """
    if peer == _ONE_DEVICE:
        workload = WORKLOADS[name]
        return workload.num_seeds is None and devices_for("ppo_jax", workload, devices) > 1
    return peer == "ppo_jax" or name in PEERS[peer].workloads


def start(
    name: str, pythons: dict[str, Path], devices: int, *, prepare: bool
) -> dict[str, Contender]:
    """Starts all contenders of a workload.

    Args:
      name: of the workload.
      pythons: interpreter of each contender.
      devices: number of devices that may be used.
      prepare: prepare one contender after the other, as they are started.
    """
    workload = WORKLOADS[name]
    described = describe(workload)
    contenders: dict[str, Contender] = {}
    for peer, python in pythons.items():
        if takes_part(peer, name, devices):
            script = PEERS[peer].script if peer in PEERS else "ours.py"
            share = devices_for(peer, workload, devices)
            described["num_devices"] = share if workload.num_seeds is None else 1
            contenders[peer] = Contender(python, script, described, share)
            if prepare:
                Contender.prepare([contenders[peer]])
    return contenders


def measure(
    name: str, contenders: dict[str, Contender], repeats: int, devices: int
) -> dict[str, Any]:
    """Measures the contenders of one workload, one run of each in turn, and closes them."""
    workload = WORKLOADS[name]
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in contenders}
    for seed in range(1, repeats + 1):
        for peer, contender in contenders.items():
            runs[peer].append(contender.ask({"seed": seed}))
    for contender in contenders.values():
        contender.close()
    rows = {}
    for peer, results in runs.items():
        rates = [
            result.get("timesteps", workload.timesteps) / result["seconds"] for result in results
        ]
        pairs = zip(
            rates, (workload.timesteps / r["seconds"] for r in runs["ppo_jax"]), strict=True
        )
        rows[peer] = {
            **contenders[peer].figures,
            "devices": devices_for(peer, workload, devices),
            "seconds": [result["seconds"] for result in results],
            "steps_per_second": statistics.median(rates),
            "ours_is_faster_by": statistics.median(ours / theirs for theirs, ours in pairs),
            **_summary([result["return"] for result in results]),
            "peak_bytes": contenders[peer].warm_up["peak_bytes"],
        }
    return {"workload": name, "title": workload.title, "contenders": rows}


def _summary(returns: list[float | None]) -> dict[str, float | None]:
    """Returns the mean of a peer's returns and its standard error."""
    known = [value for value in returns if value is not None]
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"return": statistics.mean(known) if known else None, "return_error": error}


def _shown_return(row: dict[str, Any]) -> str:
    """Returns a return with its standard error as text."""
    if row["return"] is None:
        return "-"
    error = row["return_error"]
    return f"{row['return']:.1f}" + ("" if error is None else f" ± {error:.1f}")


def _shown_size(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f} MiB"


def python_of(peer: str, folder: Path) -> Path:
    """Returns the interpreter of a peer's environment, which is made if it is missing or
    outdated.
    """
    found = CLEANRL if peer == "cleanrl" else PEERS[peer]
    home = folder / found.environment
    python, stamp = home / "bin" / "python", home / "installed"
    wanted = "\n".join(found.requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *found.requirements]
        subprocess.run(install, check=True)
        stamp.write_text(wanted)
    return python


def add_peer_arguments(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds the options that say which of some peers take part, for `pythons_of`."""
    parser.add_argument("--peer", nargs="*", choices=names, help="by default all that can run")
    parser.add_argument("--purejaxrl", type=Path, help="a checkout of PureJaxRL")
    parser.add_argument("--environments", type=Path, default=Path(".cache/peers"))


def pythons_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Path]:
    """Returns the interpreter of each peer that takes part."""
    peers = arguments.peer
    if peers is None:
        peers = [peer for peer in PEERS if peer != "purejaxrl" or arguments.purejaxrl]
    if "purejaxrl" in peers:
        if arguments.purejaxrl is None or not (arguments.purejaxrl / "purejaxrl").is_dir():
            parser.error("--purejaxrl must name a checkout of PureJaxRL, which holds purejaxrl/.")
        os.environ["PUREJAXRL"] = str(arguments.purejaxrl.resolve())
    return {peer: python_of(peer, arguments.environments) for peer in peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(CPU_SET))
    add_peer_arguments(parser, PEERS)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the medians count")
    parser.add_argument("--devices", type=int, default=1, help="on a CPU, at most one per core")
    parser.add_argument(
        "--compile-together",
        action="store_true",
        help="compile all trainers and workloads at the same time; needs cores and memory",
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    pythons = {"ppo_jax": Path(sys.executable)}
    pythons[_ONE_DEVICE] = pythons["ppo_jax"]
    pythons |= pythons_of(arguments, parser)
    print(
        "| workload | trainer | devices | steps/s | ours is faster by | return | compile "
        "| program's memory | process's peak |\n|---|---|---|---|---|---|---|---|---|"
    )
    started: dict[str, dict[str, Contender]] = {}
    if arguments.compile_together:
        for name in arguments.workload:
            started[name] = start(name, pythons, arguments.devices, prepare=False)
        Contender.prepare([c for group in started.values() for c in group.values()])
    results = []
    for name in arguments.workload:
        contenders = started.get(name) or start(name, pythons, arguments.devices, prepare=True)
        result = measure(name, contenders, arguments.repeats, arguments.devices)
        results.append(result)
        for peer, row in result["contenders"].items():
            print(
                f"| {name} {result['title']} | {peer} | {row['devices']} "
                f"| {row['steps_per_second']:,.0f} "
                f"| {row['ours_is_faster_by']:.2f} | {_shown_return(row)} "
                f"| {row['compile_seconds']:.1f} s | {_shown_size(row.get('program_bytes'))} "
                f"| {row['peak_bytes'] / 2**20:.0f} MiB |",
                flush=True,
            )
        if arguments.json:  # after each workload: an interrupted comparison keeps what it has
            machine.write_results(arguments.json, results)


if __name__ == "__main__":
    main()
