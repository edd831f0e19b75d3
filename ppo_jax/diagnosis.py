"""Diagnosis of updates that are NaN or infinite: the first such quantity, and the operation."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from ppo_jax.config import Config
from ppo_jax.hparams import HParams
from ppo_jax.stages.collect import Collected
from ppo_jax.stages.losses import Losses
from ppo_jax.trainer import collect_rollout, make_stages, make_trainer, update_keys
from ppo_jax.types import Batch, Scalars, TrainState, Trajectory

Diagnosis = Callable[[TrainState, HParams], str | None]
"""`(state, hparams) -> name` of the first quantity that is NaN or infinite; None if none is."""


def make_diagnosis(config: Config) -> Diagnosis:
    """Returns a function that repeats the next update and names what is NaN or infinite in it.

    Quantities are searched in the order in which an update computes them: policy and statistics,
    the rollout step by step, values, advantages, losses, gradients. The state is that of a single
    training before the update; hyperparameters are complete.

    Args:
      config: of the training.
    """
    # The repetition runs on one device. Several devices that share the environments draw numbers of
    # their own, so a repeated rollout starts from their state but takes other actions.
    stages = make_stages(config.replace(num_devices=1))
    losses = stages.losses

    @jax.jit
    def repeat(state: TrainState, hparams: HParams) -> tuple[Collected, Any, Any]:
        collected = collect_rollout(stages, state, hparams, update_keys(state).rollout)
        batch = collected.batch._replace(
            advantages=losses.normalize_advantages(collected.batch.advantages, collected.batch.mask)
        )
        params = state.learner.params
        return collected, *_losses_and_gradients(losses, params, batch, hparams)

    def diagnose(state: TrainState, hparams: HParams) -> str | None:
        state = jax.device_put(state, jax.local_devices()[0])
        collected, metrics, gradients = repeat(state, jax.tree.map(jnp.float32, hparams))
        batch = collected.batch
        return (
            _first_leaf({"parameters": state.learner.params, "statistics": state.statistics})
            or _first_step(collected.trajectory)
            or _first_leaf({"values": batch.value, "log-probabilities": batch.log_prob})
            or _first_leaf({"advantages": batch.advantages, "targets": batch.targets})
            or _first_leaf(metrics)
            or _first_leaf({"gradient": gradients})
        )

    return diagnose


def _losses_and_gradients(losses: Losses, params: Any, batch: Batch, hparams: HParams) -> Any:
    """Returns the metrics of the losses and their gradients, over the whole batch."""
    # Separate losses rather than the joint one, which not every algorithm descends.
    parts = [losses.policy] if batch.targets is None else [losses.policy, losses.value]
    metrics: Scalars = {}
    gradients = []
    for loss in parts:
        (_, scalars), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch, hparams)
        metrics |= scalars
        gradients.append(gradient)
    return metrics, gradients[0] if len(parts) == 1 else jax.tree.map(jnp.add, *gradients)


def _first_step(trajectory: Trajectory) -> str | None:
    """Returns the first quantity of the rollout that is not finite, with its step."""
    # In the order in which a step computes them.
    quantities = {
        "observation": trajectory.obs,
        "parameters of the action distribution": trajectory.action_params,
        "action": trajectory.action,
        "reward": trajectory.reward,
        "next observation": trajectory.final_obs,
    }
    found: tuple[int, int, str] | None = None
    for name, tree in quantities.items():
        for leaf in jax.tree.leaves(tree):
            bad = ~np.isfinite(leaf).reshape(*leaf.shape[:2], -1).all(axis=-1)
            if bad.any():
                step, env = (int(index[0]) for index in np.nonzero(bad))
                if found is None or step < found[0]:
                    found = (step, env, name)
    if found is None:
        return None
    step, env, name = found
    return f"{name} of environment {env} at step {step} of the rollout"


def _first_leaf(tree: Any) -> str | None:
    """Returns the path of the first array of a tree that is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not np.isfinite(leaf).all():
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def make_operation_finder(config: Config) -> Diagnosis:
    """Returns a function that repeats the next update and names the operation that made a NaN.

    Every operation is checked, so that the update takes several times as long as usual. Infinities
    are not reported, because many operations make them on purpose.

    Args:
      config: of the training.
    """
    trainer = make_trainer(config.replace(num_devices=1))
    checked = jax.jit(checkify.checkify(trainer.step, errors=checkify.nan_checks))

    def find(state: TrainState, hparams: HParams) -> str | None:
        state = jax.device_put(state, jax.local_devices()[0])
        error, _ = checked(state, jax.tree.map(jnp.float32, hparams))
        exception = error.get_exception()
        if exception is None:
            return None
        operation = f"the operation {getattr(exception, 'prim', 'of an unknown name')}"
        place = _place(getattr(exception, "traceback_info", None))
        return operation if place is None else f"{operation} at {place}"

    return find


def _place(recorded: Any) -> str | None:
    """Returns file, line and function of an operation, in code of this package or of a user."""
    # JAX records the traceback of every operation; its type has no public name.
    if not hasattr(recorded, "as_python_traceback"):
        return None
    libraries = tuple(str(Path(str(module.__file__)).parent) for module in (jax, flax))
    frames = traceback.extract_tb(recorded.as_python_traceback())
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    return f"{own[-1].filename}:{own[-1].lineno} ({own[-1].name})" if own else None
