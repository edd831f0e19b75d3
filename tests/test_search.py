"""Searches as runs: their tables, plots and best policy, and what stops them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, HParams, search
from ppo_jax.cli import main
from ppo_jax.population.halving import make_halving
from ppo_jax.population.pbt import make_pbt
from ppo_jax.population.rounds import training_score
from ppo_jax.population.search_space import LogUniform
from ppo_jax.runs import device_memory, search_plots
from ppo_jax.runs import search as search_module
from ppo_jax.runs.search_tables import make_search_tables
from ppo_jax.runs.trained import evaluate_run
from tests.quadratic import quadratic, quadratic_that_breaks

CONFIG = Config(num_envs=2, num_steps=16, hidden_sizes=(8,), total_timesteps=6 * 2 * 32)
SPACE = {"learning_rate": LogUniform(1e-4, 1e-1), "ent_coef": [0.01, 0.1]}
SHAPE = {"num_members": 6, "num_rounds": 6, "eval_episodes": 4, "progress": False}
RATES = {"learning_rate": LogUniform(1e-3, 10.0)}


@pytest.fixture(scope="module")
def pbt(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "pbt"
    return search(CONFIG, SPACE, method="pbt", run_dir=path, seed=3, **SHAPE)


@pytest.fixture(scope="module")
def halving(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "halving"
    return search(CONFIG, SPACE, method="halving", run_dir=path, **SHAPE)


@pytest.mark.parametrize("name", ["pbt", "halving"])
def test_rounds_in_pieces_are_the_whole_search(name):
    keys = jax.random.split(jax.random.key(0), 9)
    options = {"num_rounds": 4, "updates_per_round": 6, "score": training_score}
    if name == "pbt":
        whole = make_pbt(quadratic(), ["learning_rate"], **options)
        hparams = HParams(learning_rate=jnp.geomspace(1e-2, 1.0, 9))
    else:
        whole, hparams = make_halving(quadratic(), RATES, **options), None
    expected, record = jax.jit(whole.run)(keys, hparams)
    state = whole.init(keys, hparams)
    advance, finish_round = jax.jit(whole.advance), jax.jit(whole.finish_round)
    rounds = []
    for _ in range(4):
        for count in (1, 3, 2):
            state = advance(state, np.int32(count))
        state, one = finish_round(state)
        rounds.append(one)
    stacked = jax.tree.map(lambda *x: np.stack(x), *rounds)
    for x, y in zip(jax.tree.leaves(stacked), jax.tree.leaves(record), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    np.testing.assert_allclose(
        state.states.learner.params["x"], expected.states.learner.params["x"], rtol=1e-6
    )


def test_the_tables_of_a_population_tell_its_lineage(pbt):
    members, curves = pbt.members, pbt.curves
    assert list(members["member"]) == list(range(6))
    assert len(curves) == 6 * 6
    assert pbt.names == ("learning_rate", "ent_coef")
    assert (members["timesteps"] == CONFIG.total_timesteps).all()
    values = curves.pivot_table(index="round", columns="member", values="learning_rate")
    parents = curves.pivot_table(index="round", columns="member", values="parent").astype(int)
    for number in range(1, 6):
        inherited = values.loc[number, parents.loc[number]].to_numpy()
        ratio = values.loc[number + 1].to_numpy() / inherited
        is_copy = parents.loc[number].to_numpy() != np.arange(6)
        assert is_copy.sum() == 1  # a quarter of six
        np.testing.assert_allclose(ratio[~is_copy], 1.0)
        np.testing.assert_allclose(np.abs(np.log(ratio[is_copy])), np.log(1.25), rtol=1e-5)
    np.testing.assert_allclose(members["learning_rate"], values.loc[6])
    last = curves[curves["round"] == 6]
    np.testing.assert_array_equal(members["score"], last["score"])
    assert curves["train/entropy"].notna().all()


def test_the_tables_of_halving_tell_every_trial_s_life(halving):
    members, curves = halving.members, halving.curves
    assert len(curves) == 6 * 6  # every slot trains in every round
    assert (curves.groupby("round")["slot"].nunique() == 6).all()
    assert curves.groupby("member")["learning_rate"].nunique().max() == 1
    assert list(members["member"]) == list(range(curves["member"].max() + 1))
    is_stopped = curves.groupby("member")["stopped"].any()
    assert (members["eval/return"].isna() == is_stopped.to_numpy()).all()
    assert (~is_stopped).sum() == 6
    rounds = curves.groupby("member").size().to_numpy()
    np.testing.assert_array_equal(members["timesteps"], rounds * 2 * 32)
    assert set(curves.loc[curves["stopped"], "update"]) <= {2, 6}  # the rungs 1 and 3


@pytest.mark.parametrize("name", ["pbt", "halving"])
def test_the_best_policy_is_kept_and_is_a_run(name, request):
    result = request.getfixturevalue(name)
    best = result.run_dir / "best"
    top = result.members.loc[result.members["eval/return"].idxmax()]
    found = json.loads((best / "evaluation.json").read_text())
    assert found == {"eval/return": top["eval/return"], "member": top["member"]}
    record = json.loads((best / "config.json").read_text())
    assert record["hparams"]["learning_rate"] == pytest.approx(top["learning_rate"])
    obs = jnp.array([0.01, 0.2, 0.03, -0.4])
    assert ppo_jax.load(best)(obs) == result.best_policy(obs)
    assert evaluate_run(best, num_episodes=3)["eval/return"] > 0


def test_the_same_search_again_is_read_and_another_is_refused(pbt):
    again = search(CONFIG, SPACE, method="pbt", run_dir=pbt.run_dir, seed=3, **SHAPE)
    assert again.run_seconds == 0.0
    pd.testing.assert_frame_equal(again.members, pbt.members)
    with pytest.raises(ConfigError, match=r"holds another \(seed differ"):
        search(CONFIG, SPACE, method="pbt", run_dir=pbt.run_dir, seed=4, **SHAPE)


def test_ctrl_c_stops_within_a_piece_and_keeps_the_rounds(monkeypatch):
    real_run = search_module._run

    def run(*arguments, is_stopped):
        assert not is_stopped()
        calls = iter([False] * 5)  # rounds of one or two pieces
        return real_run(*arguments, is_stopped=lambda: next(calls, True))

    monkeypatch.setattr(search_module, "_run", run)
    result = search(CONFIG, SPACE, method="halving", **SHAPE)
    assert not result.is_complete
    assert result.best_policy is None
    assert 0 < result.curves["round"].max() < 6
    assert result.members["eval/return"].isna().all()


def test_a_learner_that_is_not_finite_has_no_score_and_a_failure():
    whole = make_pbt(
        quadratic_that_breaks(sound_return=1.0),
        ["learning_rate"],
        num_rounds=2,
        updates_per_round=3,
        score=training_score,
    )
    rates = HParams(learning_rate=jnp.array([0.1, 0.2, 0.3, 2.0]))
    _, lineage = jax.jit(whole.run)(jax.random.split(jax.random.key(0), 4), rates)
    records = [jax.tree.map(lambda x, i=i: np.asarray(x[i]), lineage) for i in range(2)]
    returns = np.full((4, 2), 5.0)
    members, curves = make_search_tables(
        records, ["learning_rate"], CONFIG, updates_per_round=3, seed=0, returns=returns
    )
    assert members["failed_at"].tolist() == [pd.NA] * 3 + [3]
    assert curves["score"].tolist()[3] == -np.inf
    # The policy of NaNs is not the best, whatever it returned.
    returns[3] = 9.0

    class Store:
        def offer_policy(self, policy, score, *, member, config):
            assert config == CONFIG
            self.offered = policy.tolist(), score, member.number

    state = whole.init(jax.random.split(jax.random.key(0), 4), rates)
    store = Store()
    search_module._keep_best(
        store, CONFIG, state, records[0], returns=returns, policies=jnp.arange(4), seed=0
    )
    assert store.offered == (0, 5.0, 0)


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        ({}, {}, "a search needs a hyperparameter with several values"),
        ({"num_steps": [16, 32]}, {}, "varies hyperparameters; got num_steps, which are the same"),
        ({"learning_rat": [1e-3]}, {}, "must be one that the algorithm uses; learning_rat"),
        ({"max_kl": [0.1]}, {}, "max_kl is set and ppo uses"),
        ({"gamma": [0.9, 1.2]}, {}, r"gamma must be in \[0, 1\]; got 1.2"),
        (SPACE, {"num_rounds": 100}, "at least one update; got 100 rounds and 12 updates"),
        (SPACE, {"factor": 2.5}, "factor of halving must be a whole number; got 2.5"),
        (SPACE, {"factor": float("inf")}, "factor of halving must be a whole number; got inf"),
        ({"value_clip_eps": [None, 0.2]}, {}, "varies numbers; value_clip_eps has the values"),
        (SPACE, {"replaced": 0.5}, "replaced belongs to pbt"),
        (SPACE, {"num_members": 2}, "as large as factor"),
        (SPACE, {"method": "hyperband"}, "unknown search 'hyperband'"),
        (SPACE, {"seed": -1}, "a seed must be a whole number"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(space, changes, message, tmp_path):
    options = {"method": "halving", "run_dir": tmp_path / "new", **SHAPE, **changes}
    with pytest.raises(ConfigError, match=message):
        search(CONFIG, space, **options)
    assert not (tmp_path / "new").exists()


def test_a_population_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(device_memory, "limit", lambda device: 2**10)
    with pytest.raises(ConfigError, match="must fit the memory of its devices; 6 members need"):
        search(CONFIG, SPACE, method="halving", **SHAPE)


@pytest.mark.parametrize(("name", "figure"), [("pbt", "lineage"), ("halving", "rungs")])
def test_the_report_of_a_search(name, figure, request, capsys):
    result = request.getfixturevalue(name)
    assert main(["report", str(result.run_dir)]) == 0
    out = capsys.readouterr().out
    assert "members, the best first" in out
    assert ("were stopped" in out) == (name == "halving")
    for path in ("curves.png", "curves.svg", f"{figure}.png", f"{figure}.svg"):
        assert (result.run_dir / path).stat().st_size > 5000
    # The first row is the best member.
    best = search_plots.best_first(result.members).iloc[0]
    assert best["eval/return"] == result.members["eval/return"].max()


def test_the_command(tmp_path, capsys):
    words = ["sweep", "CartPole-v1", "--search", "pbt", "--learning-rate", "1e-3,1e-2", "--quiet"]
    small = ["--num-envs", "2", "--num-steps", "16", "--hidden-sizes", "8", "--eval-episodes", "2"]
    size = ["--members", "4", "--rounds", "2", "--total-timesteps", "128", "--seed", "1"]
    path = tmp_path / "search"
    assert main([*words, *small, *size, "--run-dir", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "trained 4 members" in out
    assert "2 rounds of 2 updates: 512 steps" in err
    assert (path / "lineage.png").is_file()
    assert main(["eval", str(path / "best"), "--episodes", "2"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--members", "3"], "--members needs --search. Leave it out."),
        (["--search", "pbt", "--seeds", "3"], "--seeds does not go with --search."),
        (["--search", "pbt", "--sampler", "tpe"], "--sampler does not go with --search"),
    ],
)
def test_options_of_the_other_kind_are_refused(words, message, capsys):
    assert main(["sweep", "CartPole-v1", *words]) == 2
    assert message in capsys.readouterr().err
