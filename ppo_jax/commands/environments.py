"""The command `envs`."""

import dataclasses

from ppo_jax import envs, presets


@dataclasses.dataclass(frozen=True)
class EnvsCommand:
    """List the environments that can be trained."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        from rich.console import Console
        from rich.table import Table

        table = Table("environment", "preset", box=None)
        for name in envs.names():
            table.add_row(name, _preset_summary(name))
        Console().print(table)
        return 0


def _preset_summary(name: str) -> str:
    if name not in presets.names():
        return "-"
    config, _ = presets.preset(name)
    others = len(presets.algorithms(name)) - 1
    return (
        f"{config.total_timesteps:,} steps, {config.num_envs} environments"
        f"{f'; {others} more algorithms' if others else ''}"
    )
