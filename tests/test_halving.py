"""Successive halving: who is stopped, a problem whose answer is known, and the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, make_trainer
from ppo_jax.population.halving import make_halving, stopped_trials
from ppo_jax.population.rounds import training_score
from ppo_jax.population.search_space import Choice, LogUniform, Uniform
from tests.quadratic import quadratic, quadratic_that_breaks

RATES = {"learning_rate": LogUniform(1e-3, 10.0)}


def stopped(scores, ages, number, factor=3):
    return np.asarray(
        stopped_trials(jnp.array(scores), jnp.array(ages), number, factor=factor)
    ).tolist()


def test_one_in_factor_is_left_of_those_that_start_together():
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(27).astype(float), np.zeros(27)])
    ages = np.stack([np.ones(27, int), np.zeros(27, int)])
    for factor, left in ((2, 14), (3, 9), (5, 6)):
        gone = np.array(stopped(scores, ages, 0, factor))
        assert (~gone).sum() == left
        assert scores[0][~gone].min() > scores[0][gone].max()


def test_equal_scores_leave_as_many():
    scores, ages = [[1.0] * 6, [0.0] * 6], [[1] * 6, [0] * 6]
    assert stopped(scores, ages, 0) == [False, False, True, True, True, True]


def test_newcomers_are_compared_with_all_that_came_as_far():
    # Four rounds of three; the first slot holds one trial, the others a new one every round.
    ages = [[1, 1, 1], [2, 1, 1], [3, 1, 1], [4, 1, 1]]
    scores = [[9.0, 1.0, 2.0], [0.0, 3.0, 4.0], [0.0, 8.0, 2.5], [0.0, 7.0, 6.0]]
    gone = [stopped(*so_far(scores, ages, rounds), rounds - 1) for rounds in (1, 2, 3, 4)]
    assert gone == [
        [False, True, True],
        [False, True, False],  # five have come to age 1: the best of them are two; 2 is no rung
        [False, False, True],  # of seven three; the first slot's is alone at 3, and the best
        [False, False, True],  # of nine three, 9, 8 and 7
    ]


def so_far(scores, ages, rounds):
    """With nothing in the rounds to come."""
    rest = len(scores) - rounds
    return [*scores[:rounds], *[[0.0] * 3] * rest], [*ages[:rounds], *[[0] * 3] * rest]


def test_the_best_learning_rate_is_found():
    search = make_halving(
        quadratic(), RATES, num_rounds=30, updates_per_round=5, score=training_score
    )
    result, record = jax.jit(search.run)(jax.random.split(jax.random.key(0), 27))
    record = jax.tree.map(np.asarray, record)
    oldest = record.ages[-1] >= 27
    assert oldest.any()
    rates = np.asarray(result.hparams.learning_rate)
    # Within this range x² is at most a third above its minimum; a tenth of the draws are.
    assert ((rates[oldest] > 0.5) & (rates[oldest] < 1.5)).all()
    # Every slot trains in every round; a trial's own updates are its age's.
    assert record.scores.shape == (30, 27)
    np.testing.assert_array_equal(result.states.updates_done, 5 * record.ages[-1])
    assert record.stopped[0].sum() == 18
    assert not record.stopped[-1].any()


def test_the_record_tells_every_trial_s_life():
    search = make_halving(
        quadratic(), RATES, num_rounds=12, updates_per_round=2, score=training_score
    )
    _, record = jax.jit(search.run)(jax.random.split(jax.random.key(1), 9))
    record = jax.tree.map(np.asarray, record)
    goes_on, ends = ~record.stopped[:-1], record.stopped[:-1]
    rates = record.hparams.learning_rate
    assert (record.trials[1:][goes_on] == record.trials[:-1][goes_on]).all()
    assert (rates[1:][goes_on] == rates[:-1][goes_on]).all()
    assert (record.ages[1:][goes_on] == record.ages[:-1][goes_on] + 1).all()
    assert (record.ages[1:][ends] == 1).all()
    assert (rates[1:][ends] != rates[:-1][ends]).all()
    # Numbers are given once, in order.
    np.testing.assert_array_equal(record.trials[1:][ends], 9 + np.arange(ends.sum()))
    assert (np.isin(record.ages[record.stopped], [1, 3, 9])).all()
    assert ((rates >= 1e-3) & (rates <= 10.0)).all()


def test_a_trial_that_stays_equals_the_same_trial_alone_and_a_new_one_starts_fresh():
    config = Config(num_envs=2, num_steps=16, hidden_sizes=(8,), total_timesteps=3 * 32)
    trainer = make_trainer(config)
    space = {"learning_rate": LogUniform(1e-4, 1e-2), "gamma": Choice((0.9, 0.99))}
    search = make_halving(trainer, space, num_rounds=3, updates_per_round=1)
    keys = jax.random.split(jax.random.key(0), 3)
    result, record = jax.jit(search.run)(keys, HParams(ent_coef=0.02))
    ages = np.asarray(record.ages[-1])
    assert sorted(ages)[-1] == 3
    np.testing.assert_array_equal(result.states.updates_done, ages)
    np.testing.assert_array_equal(result.hparams.ent_coef, np.float32(0.02))
    assert set(np.asarray(record.hparams.gamma).ravel()) <= {
        np.float32(0.9),
        np.float32(0.99),
    }

    def alone(key, hparams):
        state = trainer.init(jax.random.split(key)[0], hparams)
        for _ in range(3):
            state, _ = trainer.step(state, hparams)
        return state.learner.params

    (slot,) = np.flatnonzero(ages == 3)
    first = jax.tree.map(lambda x: x[0], record.hparams)
    expected = jax.jit(jax.vmap(alone))(keys, first)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[slot], y[slot], rtol=1e-5, atol=1e-6),
        result.states.learner.params,
        expected,
    )


def test_a_learner_that_is_no_longer_finite_loses():
    search = make_halving(
        quadratic_that_breaks(sound_return=-1.0),
        RATES,
        num_rounds=2,
        updates_per_round=1,
        score=training_score,
    )
    _, record = jax.jit(search.run)(jax.random.split(jax.random.key(0), 27))
    is_nan = np.asarray(record.hparams.learning_rate[0]) > 1.0
    assert 0 < is_nan.sum() <= 18
    assert np.asarray(record.stopped[0])[is_nan].all()


def test_a_learner_that_breaks_between_rungs_is_stopped_at_once():
    whole = quadratic()

    def step(state, hparams):
        state, metrics = whole.step(state, hparams)
        x = jnp.where(state.updates_done == 2, jnp.nan, state.learner.params["x"])  # an age of 2
        return state.replace(learner=state.learner.replace(params={"x": x})), metrics

    search = make_halving(
        whole._replace(step=step), RATES, num_rounds=5, updates_per_round=1, score=training_score
    )
    _, record = jax.jit(search.run)(jax.random.split(jax.random.key(0), 9))
    record = jax.tree.map(np.asarray, record)
    assert record.stopped[1:-1][record.ages[1:-1] == 2].all()
    assert record.ages.max() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"learning_rat": Uniform(0, 1)}}, "unknown hyperparameter 'learning_rat'"),
        ({"space": {"gamma": Uniform(0.9, 1.1)}}, r"gamma must be in \[0, 1\]; got 1.1"),
        ({"space": {}}, "a space must have a hyperparameter to draw"),
        ({"factor": 1}, "factor must be at least 2; got 1"),
        ({"num_rounds": 0}, "num_rounds must be a positive integer; got 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
    fields = {"space": RATES, "num_rounds": 1, "updates_per_round": 1} | changes
    with pytest.raises(ConfigError, match=message):
        make_halving(quadratic(), fields.pop("space"), **fields)


def test_a_population_is_as_large_as_its_factor():
    search = make_halving(
        quadratic(), RATES, num_rounds=1, updates_per_round=1, score=training_score
    )
    with pytest.raises(ConfigError, match="as large as factor.*got 2 and 3"):
        search.run(jax.random.split(jax.random.key(0), 2))
