"""Metrics as sums and counts: one rule of averaging for runs, sweeps and searches."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, envs, evaluate, make_trainer, resume, train
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
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


NAMES = ("first", "last", "each")


def lasting(num_agents=1, **reported):
    """Episodes last 1 to 5 steps; their reward is 1 a step, so that returns are lengths."""
    axes = (num_agents,) if num_agents > 1 else ()

    def observed(length):
        return jnp.broadcast_to(jnp.float32(length), (*axes, 1))

    def reset(key, params):
        length = jax.random.randint(key, (), 1, 6)
        return observed(length), (jnp.zeros((), jnp.int32), length)

    def step(key, state, action, params):
        time, length = state
        ends = time + 1 >= length
        # True counts as 1, also twice in a repeated action.
        metrics = {"first": time == 0, "last": ends * length, "each": length > 0, **reported}
        after = (time + 1, length)
        return Step(observed(length), after, jnp.ones(axes), ends, jnp.array(False), metrics)

    box = Box((1,))
    return Environment(
        "lasting", reset, step, (), box, Discrete(2), num_agents=num_agents, metrics=NAMES
    )


CONFIG = {"env": "lasting", "num_envs": 6, "num_steps": 4, "hidden_sizes": (4,)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_agents": 3},
        {"wrappers": {"time_limit": 9, "sticky_actions": 0.5}},
        {"wrappers": {"action_repeat": 2}},
        {"reset_pool": 4},
        {"memory": "gru", "num_minibatches": 2, "normalize_reward": True},
        {"algorithm": "reinforce", "num_steps": 5},
    ],
)
def test_metrics_of_an_environment_are_summed_over_episodes(changes):
    changes = dict(changes)
    env = lasting(changes.pop("num_agents", 1))
    envs.register("lasting", lambda: env, overwrite=True)
    config = Config(**{**CONFIG, **changes}, total_timesteps=6 * 4 * 20)
    trainer = make_trainer(config)
    state, metrics = jax.jit(trainer.run)(jax.random.key(0))
    assert metrics["episode/count"].sum() > 50
    # Episodes go on from one rollout to the next, whatever an episode reports and when.
    for name in ("last", "each"):
        np.testing.assert_allclose(metrics[f"episode/{name}"], metrics["episode/return"], rtol=1e-6)
    np.testing.assert_array_equal(metrics["episode/first"], 1.0)
    result = evaluate(trainer.policy(state), trainer.env, (), jax.random.key(1), 16)
    np.testing.assert_array_equal(result.metrics["last"], result.returns)
    np.testing.assert_array_equal(result.metrics["first"], 1.0)


def test_metrics_of_an_environment_are_in_the_files_of_a_run_that_goes_on(tmp_path):
    envs.register("lasting", lasting, overwrite=True)
    config = Config(**CONFIG, total_timesteps=6 * 4 * 10)
    arguments = {"eval_episodes": 4, "progress": False}
    whole = train(config, eval_every=5, **arguments)
    train(config.replace(total_timesteps=6 * 4 * 5), run_dir=tmp_path / "run", **arguments)
    run = resume(tmp_path / "run", total_timesteps=6 * 4 * 10, eval_every=5, progress=False)
    for name in NAMES:
        column = f"episode/{name}"
        np.testing.assert_array_equal(run.metrics[column][:5], whole.metrics[column][:5])
    np.testing.assert_array_equal(run.evaluations["eval/last"], run.evaluations["eval/return"])
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["seeds"][0]
    assert found["eval/last"] == found["eval/return"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ("first", "last")}, r"names \['first', 'last'\] and reports .*'each'"),
        ({"metrics": (*NAMES, "other")}, "must report the metrics that its environment names"),
        ({"step": lasting(each=jnp.ones(2)).step}, r"each must be a scalar; .* \(2,\)"),
        (
            {"metrics": (*NAMES, "return"), "step": lasting(**{"return": jnp.ones(())}).step},
            "not be return… or one of .*; got 'return' of lasting. Rename it",
        ),
    ],
)
def test_metrics_that_an_environment_does_not_name_are_refused(change, message):
    envs.register("lasting", lambda: lasting()._replace(**change), overwrite=True)
    with pytest.raises(ConfigError, match=message):
        make_trainer(Config(**CONFIG))
