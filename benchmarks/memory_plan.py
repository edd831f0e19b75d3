"""Largest numbers of environments and of seeds that fit a GPU, by its compiler's count.

python benchmarks/memory_plan.py --json benchmarks/results/memory-plan.json

Runs in the environment of `make accelerators`. Memory grows linearly in either number, so two
compilations give the slope. The largest power of two that should fit is compiled to confirm it.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine
from benchmarks.ahead_of_time import TARGETS, compile_ahead
from benchmarks.workloads import WORKLOADS, Workload

_SHARE = 0.9  # of a card's memory; the rest is for its runtime
_TARGET = "h100"
_CARDS = {"80 GB": 80e9, "16 GB": 16e9}


class Question(NamedTuple):
    """A workload, and what grows until the memory is full."""

    workload: str
    grows: str
    start: int
    """The smaller of the two numbers that are compiled first."""


QUESTIONS = (
    Question("cartpole-2048", "num_envs", 2**14),
    Question("breakout-2048", "num_envs", 2**11),
    Question("cartpole-1024-gru", "num_envs", 2**11),
    Question("seeds-1024", "num_seeds", 2**10),
)


def grown(question: Question, number: int) -> Workload:
    """Returns the workload with so many environments, or seeds."""
    workload = WORKLOADS[question.workload]
    if question.grows == "num_seeds":
        return workload._replace(num_seeds=number)
    config = workload.config
    timesteps = 2 * number * config.num_steps
    return workload._replace(config=config.replace(num_envs=number, total_timesteps=timesteps))


@functools.cache
def needed(question: Question, number: int) -> float:
    """Returns the bytes of the program, its results included."""
    workload = grown(question, number)
    figures, _ = compile_ahead(Path(sys.executable), "ours", workload, TARGETS[_TARGET])
    return figures["temporary_bytes"] + figures["output_bytes"]


def largest(question: Question, card: str) -> dict[str, Any]:
    """Returns the largest power of two that fits, and the memory that it takes."""
    limit = _SHARE * _CARDS[card]
    few, more = (needed(question, scale * question.start) for scale in (1, 2))
    slope = (more - few) / question.start
    number = 2 ** (int((limit - few) / slope + question.start).bit_length() - 1)
    while (size := needed(question, number)) > limit:
        number //= 2
    return {**question._asdict(), "card": card, "number": number, "bytes": size, "slope": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print("| card | training | grows | largest | memory | each takes |\n|---|---|---|---|---|---|")
    rows = []
    for question in QUESTIONS:
        for card in _CARDS:
            row = largest(question, card)
            rows.append(row)
            title = WORKLOADS[question.workload].title
            print(
                f"| {card} | {title} | {question.grows} | {row['number']:,} "
                f"| {row['bytes'] / 1e9:.1f} GB | {row['slope'] / 1e3:,.0f} kB |",
                flush=True,
            )
            if arguments.json is not None:
                machine.write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
