"""Metrics as sums and counts: one rule of averaging for runs, sweeps and searches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, make_trainer
from ppo_jax.population.pbt import make_pbt
from ppo_jax.population.rounds import training_score
from ppo_jax.stages.metrics import Metrics
from tests.quadratic import quadratic


def metrics(losses, return_sums, counts, xp=np):
    totals = {"train/loss": xp.array(losses), "episode/return": xp.array(return_sums)}
    return Metrics(totals, xp.ones(len(losses)), xp.array(counts))


@pytest.mark.parametrize("xp", [np, jnp])
def test_updates_are_averaged_over_updates_and_episodes_over_episodes(xp):
    updates = metrics([1.0, 3.0, 5.0], [0.0, 8.0, 10.0], [0, 1, 5], xp)
    np.testing.assert_array_equal(updates["train/loss"], [1.0, 3.0, 5.0])
    np.testing.assert_array_equal(updates["episode/return"], [np.nan, 8.0, 2.0])
    window = jax.tree.map(lambda x: x.sum(axis=0), updates)
    assert window["train/loss"] == 3.0
    assert window["episode/return"] == 18.0 / 6
    assert window["episode/count"] == 6
    assert sorted(window) == ["episode/count", "episode/return", "train/loss"]
    with pytest.raises(KeyError):
        window["train/nothing"]


def test_a_window_of_a_training_is_the_sum_of_its_updates():
    trainer = make_trainer(
        Config(num_envs=4, num_steps=16, hidden_sizes=(8,), total_timesteps=4 * 64)
    )
    _, updates = jax.jit(trainer.run)(jax.random.key(0))
    window = jax.tree.map(lambda x: np.asarray(x).sum(axis=0), updates)
    assert window.num_updates == 4
    np.testing.assert_allclose(
        window["train/entropy"], np.mean(updates["train/entropy"]), rtol=1e-6
    )
    total = np.nansum(np.asarray(updates["episode/return"]) * updates["episode/count"])
    np.testing.assert_allclose(window["episode/return"], total / window["episode/count"], rtol=1e-6)


def test_a_round_without_an_episode_has_no_score():
    whole = quadratic()

    def step(state, hparams):
        state, _ = whole.step(state, hparams)
        is_silent = state.key[1] % 2 == 0
        count = jnp.where(is_silent, 0.0, 1.0)
        return state, Metrics({"episode/return": count * 7.0}, jnp.ones(()), count)

    trainer = whole._replace(step=step)
    search = make_pbt(
        trainer, ["learning_rate"], num_rounds=1, updates_per_round=1, score=training_score
    )
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(8))
    _, lineage = jax.jit(search.run)(keys, trainer.hparams.replace(learning_rate=jnp.full(8, 0.1)))
    assert set(np.asarray(lineage.scores[0])) == {7.0, -np.inf}
