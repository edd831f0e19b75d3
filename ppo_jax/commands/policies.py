"""Commands that use the policy of a run: `eval` and `export`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ppo_jax.commands.common import enable_compilation_cache, print_evaluation
from ppo_jax.errors import require_positive_integer
from ppo_jax.export.formats import Format
from ppo_jax.runs.directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class EvalCommand:
    """Evaluate the policy of a run over complete episodes, with greedy and with sampled actions."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax train` wrote."""
    episodes: int = 128
    """Episodes, for each of the run's seeds."""
    seed: int = 0
    """Random seed of the evaluation."""
    best: bool = False
    """Evaluate the best policy of a run that was trained with --eval-every, not the last one."""
    actions: Literal["both", "greedy", "sampled"] = "both"
    """Evaluate with greedy (most likely) actions, with sampled actions, or once with each."""
    gymnasium: bool = False
    """Play in Gymnasium's environment of the same name, and say how it differs from gymnax's."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        require_positive_integer("episodes", self.episodes)
        directory = RunDirectory.open(self.run_dir)
        enable_compilation_cache()
        for acting in ("greedy", "sampled") if self.actions == "both" else (self.actions,):
            options: dict[str, Any] = {
                "seed": self.seed,
                "num_episodes": self.episodes,
                "greedy": acting == "greedy",
                "best": self.best,
            }
            if self.gymnasium:
                from ppo_jax.results.gymnasium_client import evaluate_run_in_gymnasium

                result = evaluate_run_in_gymnasium(directory.path, **options)
            else:
                from ppo_jax.runs.trained import evaluate_run

                result = evaluate_run(directory.path, **options)
            where = " in Gymnasium" if self.gymnasium else ""
            print_evaluation(result, is_detailed=True, where=where)
        if self.gymnasium:
            from ppo_jax.results.gymnasium_client import comparison

            print(comparison(directory.read_config()[0].env))
        return 0


_USES = {
    "stablehlo": "jax.export.deserialize(pathlib.Path({0!r}).read_bytes()).call({1})",
    "onnx": "onnxruntime.InferenceSession({0!r}).run(None, inputs); inputs: {2}",
    "numpy": "import policy; policy.policy(obs), where Python finds {0}",
    "web": "open {0} in a browser",
}


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Write the policy of a run in a format that needs no ppo_jax."""

    run_dir: tyro.conf.Positional[Path]
    """A directory that `ppo-jax train` wrote."""
    format: Format
    """StableHLO for JAX on CPUs, NVIDIA GPUs and TPUs, ONNX, NumPy arrays with a short module, or a
    page that plays CartPole."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """Folder of the files; RUN/export/FORMAT by default."""
    run_seed: int | None = None
    """Seed whose policy is exported, for a run of several seeds; the first by default."""
    best: bool = False
    """Export the best policy of a run that was trained with --eval-every, not the last one."""
    overwrite: bool = False
    """Replace files of the same names."""

    def run(self) -> int:
        """Runs the command; returns its exit status."""
        # A misspelt directory is reported before JAX is imported.
        directory = RunDirectory.open(self.run_dir)
        from ppo_jax.export.files import export_run

        paths = export_run(
            self.run_dir,
            self.format,
            self.output,
            run_seed=self.run_seed,
            best=self.best,
            overwrite=self.overwrite,
        )
        has_memory = directory.read_config()[0].memory is not None
        arguments = "obs, state" if has_memory else "obs"
        seeds = directory.read_seeds()
        seed = seeds if isinstance(seeds, int) else self.run_seed or seeds[0]
        print(f"exported: {', '.join(map(str, paths))} (seed {seed})")
        inputs = ""
        if self.format == "onnx":
            from ppo_jax.export.onnx import describe_inputs

            inputs = describe_inputs(paths[-1])
        print(f"use it:   {_USES[self.format].format(str(paths[-1]), arguments, inputs)}")
        return 0
