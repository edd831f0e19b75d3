"""Results of an adaptive search as tidy tables: a row per member, and one per member and round."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ppo_jax.config import Config
from ppo_jax.population.halving import Record
from ppo_jax.population.pbt import Lineage

SearchRecord = Record | Lineage


def member_numbers(record: SearchRecord) -> np.ndarray:
    """Returns the number of the member in each slot in one round, `[S]`.

    In successive halving a new trial is a new member; in population-based training a member keeps
    its slot.
    """
    if isinstance(record, Record):
        return np.asarray(record.trials)
    return np.arange(len(record.scores))


def make_search_tables(
    records: Sequence[SearchRecord],
    names: Sequence[str],
    config: Config,
    *,
    updates_per_round: int,
    seed: int,
    returns: np.ndarray | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns a table with a row per member, and one with a row per member and round.

    Args:
      records: of each finished round, `[S]`.
      names: hyperparameters that are searched.
      config: of all members.
      updates_per_round: updates of a member in a round.
      seed: of the search.
      returns: of the final evaluation, `[S, episodes]`; None if the search was stopped before.
    """
    rows = [
        row
        for number, record in enumerate(records, start=1)
        for row in _rows_of_round(
            number,
            record,
            names,
            updates_per_round=updates_per_round,
            batch_size=config.batch_size,
            seed=seed,
        )
    ]
    curves = pd.DataFrame(rows)
    if curves.empty:
        return curves, curves
    # The last round of each member has the hyperparameters that it ended with.
    last = curves.groupby("member").tail(1).set_index("member").sort_index()
    label = ["configuration", "seed", *names, "round", "timesteps", "score"]
    members = last[label].copy()
    # A member that is not healthy has no score.
    failed = curves[np.isneginf(curves["score"])].groupby("member")["update"].first()
    members["failed_at"] = failed.reindex(members.index).astype("Int64")
    members["eval/return"] = np.nan
    members["eval/return_std"] = np.nan
    if returns is not None:
        numbers = member_numbers(records[-1])
        members.loc[numbers, "eval/return"] = returns.mean(axis=1)
        members.loc[numbers, "eval/return_std"] = returns.std(axis=1)
    return members.reset_index(), curves


def _rows_of_round(
    number: int,
    record: SearchRecord,
    names: Sequence[str],
    *,
    updates_per_round: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    numbers = member_numbers(record)
    ages = np.full(len(numbers), number)
    if isinstance(record, Record):
        ages = np.asarray(record.ages)
    metrics = {name: np.asarray(values) for name, values in sorted(record.metrics.items())}
    rows = []
    for slot, (member, age) in enumerate(zip(numbers.tolist(), ages.tolist(), strict=True)):
        # What became of the member after the round.
        if isinstance(record, Record):
            fate = {"slot": slot, "stopped": bool(record.stopped[slot])}
        else:
            fate = {"parent": int(record.parents[slot])}
        rows.append(
            {
                "member": member,
                "configuration": member,
                "seed": seed,
                **{name: float(getattr(record.hparams, name)[slot]) for name in names},
                "round": number,
                "update": age * updates_per_round,
                "timesteps": age * updates_per_round * batch_size,
                "score": float(record.scores[slot]),
                **fate,
                **{name: float(values[slot]) for name, values in metrics.items()},
            }
        )
    return rows
