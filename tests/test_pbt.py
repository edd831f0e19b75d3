"""Population-based training: its two steps, a problem whose answer is known, and the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, make_trainer
from ppo_jax.population.pbt import exploit, explore, make_pbt
from ppo_jax.population.rounds import training_score
from tests.quadratic import quadratic, quadratic_that_breaks


def test_the_worst_take_over_from_the_best_and_no_other_changes():
    scores = jnp.array([5.0, -jnp.inf, 7.0, 1.0, 6.0, 2.0, 8.0, 3.0])
    seen = set()
    for seed in range(20):
        parents = np.asarray(exploit(jax.random.key(seed), scores, num_replaced=2))
        assert list(np.delete(parents, [1, 3])) == [0, 2, 4, 5, 6, 7]
        seen |= {int(parents[1]), int(parents[3])}
    assert seen == {2, 6}


def test_values_of_the_replaced_move_up_or_down_and_stay_in_range():
    hparams = HParams(learning_rate=jnp.full(400, 0.1), gamma=jnp.full(400, 0.99))
    replaced = jnp.arange(400) < 300
    moved = explore(jax.random.key(0), hparams, replaced, ["learning_rate", "gamma"], 1.25)
    rate = np.asarray(moved.learning_rate)
    np.testing.assert_allclose(np.unique(rate[:300]), [0.08, 0.125], rtol=1e-6)
    assert 100 < (rate[:300] > 0.1).sum() < 200
    assert (rate[300:] == np.float32(0.1)).all()
    np.testing.assert_allclose(np.unique(moved.gamma[:300]), [0.99 / 1.25, 1.0], rtol=1e-6)


def test_the_best_learning_rate_is_found():
    rates = jnp.geomspace(1e-3, 0.1, 16)  # all of them too small
    search = make_pbt(
        quadratic(), ["learning_rate"], num_rounds=60, updates_per_round=20, score=training_score
    )
    result, lineage = jax.jit(search.run)(
        jax.random.split(jax.random.key(0), 16), HParams(learning_rate=rates)
    )
    assert 0.6 < np.median(result.hparams.learning_rate) < 1.5
    assert (result.states.updates_done == 1200).all()
    assert lineage.scores.shape == (60, 16)
    # Four of sixteen are replaced after every round but the last, where members stay themselves.
    replaced = np.asarray(lineage.parents) != np.arange(16)
    assert (replaced.sum(1) == [*[4] * 59, 0]).all()
    values = np.asarray(lineage.hparams.learning_rate)
    ratio = values[1:] / np.take_along_axis(values, np.asarray(lineage.parents), 1)[:-1]
    np.testing.assert_allclose(ratio[~replaced[:-1]], 1.0)
    np.testing.assert_allclose(np.abs(np.log(ratio[replaced[:-1]])), np.log(1.25), rtol=1e-4)


def test_a_replaced_member_goes_on_with_its_parent_s_learner_and_its_own_environments():
    config = Config(
        num_envs=2,
        num_steps=16,
        hidden_sizes=(8,),
        total_timesteps=4 * 32,
        normalize_obs=True,
    )
    trainer = make_trainer(config)
    rates = HParams(learning_rate=jnp.array([1e-4, 1e-3, 1e-2, 1e-1]))
    # Two rounds; in the second the learning rate is what it was, so learners are only copied.
    search = make_pbt(trainer, ["learning_rate"], num_rounds=2, updates_per_round=1)
    result, lineage = jax.jit(search.run)(jax.random.split(jax.random.key(0), 4), rates)
    parents = np.asarray(lineage.parents[0])
    (child,) = np.flatnonzero(parents != np.arange(4))
    assert lineage.scores[0][parents[child]] == lineage.scores[0].max()
    counts = result.states.statistics.obs[0].num_samples
    assert (counts == 2 * 32).all()
    obs = np.asarray(result.states.rollout.obs)
    assert not np.array_equal(obs[child], obs[parents[child]])
    means = np.asarray(result.states.statistics.obs[0].mean)
    assert not np.array_equal(means[child], means[parents[child]])
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(result.hparams)])).all()


def test_a_learner_that_is_no_longer_finite_is_no_parent():
    search = make_pbt(
        quadratic_that_breaks(sound_return=1.0),
        ["learning_rate"],
        num_rounds=2,
        updates_per_round=1,
        score=training_score,
    )
    rates = HParams(learning_rate=jnp.array([0.1, 0.2, 0.3, 2.0]))
    result, lineage = jax.jit(search.run)(jax.random.split(jax.random.key(0), 4), rates)
    assert lineage.scores[0, 3] == -np.inf
    assert np.isfinite(result.states.learner.params["x"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["learning_rat"]}, "unknown hyperparameter 'learning_rat'"),
        ({"names": ["actor_gain"]}, "must act throughout; got actor_gain"),
        ({"replaced": 0.6}, r"must be in \(0, 0.5\]; got 0.6"),
        ({"num_rounds": 0}, "num_rounds must be a positive integer; got 0"),
        ({"factor": 1.0}, "factor must be a finite number above 1; got 1.0"),
        ({"factor": float("nan")}, "factor must be a finite number above 1; got nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
    fields = {"names": ["gamma"], "num_rounds": 1, "updates_per_round": 1} | changes
    with pytest.raises(ConfigError, match=message):
        make_pbt(quadratic(), **fields)


def test_a_population_has_a_value_for_every_member():
    search = make_pbt(
        quadratic(), ["gamma"], num_rounds=1, updates_per_round=1, score=training_score
    )
    keys = jax.random.split(jax.random.key(0), 4)
    with pytest.raises(ConfigError, match="a value for each of the 4 members; gamma is 0.9"):
        search.run(keys, HParams(gamma=0.9))
    with pytest.raises(ConfigError, match="0.25 of 2 is none"):
        search.run(keys[:2], HParams(gamma=jnp.full(2, 0.9)))


def balancing_params(params):
    """A linear policy of CartPole that balances the pole for a whole episode."""
    weights = jnp.array([0.1, 0.5, 3.0, 1.0])
    kernel = 100.0 * jnp.stack([-weights, weights], axis=1)
    actor = {"kernel": kernel, "bias": jnp.zeros(2)}
    return {"params": {**params["params"], "actor_out": actor}}


@pytest.mark.parametrize("is_evaluated", [True, False])
def test_a_perfect_policy_is_never_replaced_by_a_worse_one(is_evaluated):
    """In rounds shorter than an episode the better policy ends no episode, and the worse one many.

    Scored by the episodes that ended, the perfect policies would be replaced.
    """
    config = Config(
        num_envs=4,
        num_steps=16,
        hidden_sizes=(),
        total_timesteps=5 * 2 * 64,
        lr_schedule="constant",
    )
    trainer = make_trainer(config)

    def init(key, hparams, env_params):
        state = trainer.init(key, hparams, env_params)
        params = jax.tree.map(
            lambda good, bad: jnp.where(hparams.gamma > 0.95, good, bad),
            balancing_params(state.learner.params),
            state.learner.params,
        )
        return state.replace(learner=state.learner.replace(params=params))

    score = None if is_evaluated else training_score
    search = make_pbt(
        trainer._replace(init=init), ["ent_coef"], num_rounds=5, updates_per_round=2, score=score
    )
    gamma = jnp.array([0.9, 0.99] * 4)
    hparams = HParams(learning_rate=0.0, gamma=gamma, ent_coef=jnp.full(8, 0.01))
    _, lineage = jax.jit(search.run)(jax.random.split(jax.random.key(0), 8), hparams)
    is_perfect = np.asarray(gamma) > 0.95
    replaced = False
    for scores, parents in zip(lineage.scores, lineage.parents, strict=True):
        if is_evaluated:
            assert np.asarray(scores)[is_perfect].min() > np.asarray(scores)[~is_perfect].max(
                initial=0
            )
        replaced |= bool((is_perfect & ~is_perfect[parents]).any())
        is_perfect = is_perfect[np.asarray(parents)]
    assert replaced != is_evaluated
    assert is_perfect.all() == is_evaluated
