"""Results of a sweep's members as tidy tables."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ppo_jax.config import Config
from ppo_jax.population.member import Outcome
from ppo_jax.population.plan import Member


def make_tables(
    config: Config, members: Sequence[Member], outcome: Outcome
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns a table with a row per member, and one with a row per member and window of updates.

    Args:
      config: of the members.
      members: S members that were trained together.
      outcome: their results, `[S]`.
    """
    num_rows = np.shape(outcome.curves.num_updates)[1]
    # Update i is in window i * num_rows // num_updates. Window w ends after ends[w] updates.
    ends = [math.ceil((row + 1) * config.num_updates / num_rows) for row in range(num_rows)]
    columns = {name: np.asarray(values) for name, values in sorted(outcome.curves.items())}
    summaries, curves = [], []
    for i, member in enumerate(members):
        label = {
            "member": member.number,
            "configuration": member.configuration,
            "seed": member.seed,
            **{name: to_cell(value) for name, value in member.row.items()},
        }
        returns = np.asarray(outcome.returns[i])
        failed_at = int(outcome.failed_at[i])
        summaries.append(
            {
                **label,
                "timesteps": config.num_updates * config.batch_size,
                "eval/return": float(returns.mean()),
                "eval/return_std": float(returns.std()),
                "failed_at": failed_at if failed_at >= 0 else None,
            }
        )
        curves.append(
            pd.DataFrame(
                {
                    **label,
                    "update": ends,
                    "timesteps": [end * config.batch_size for end in ends],
                    **{name: values[i] for name, values in columns.items()},
                }
            )
        )
    table = pd.DataFrame(summaries).astype({"failed_at": "Int64"})
    return table, pd.concat(curves, ignore_index=True)


def to_cell(value: Any) -> Any:
    """Returns a value as a table or JSON holds it: numbers and words unchanged, the rest as text.

    >>> to_cell((64, 64)), to_cell(None), to_cell(np.float32(0.5))
    ('64x64', None, 0.5)
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and np.ndim(value) == 0:
        return value.item()
    if isinstance(value, tuple) and all(isinstance(x, int) for x in value):
        return "x".join(map(str, value))
    return repr(value)
