"""Populations: spaces, plans, chunks, failures, resuming, reports."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats

import ppo_jax
from ppo_jax import Config, ConfigError, HParams, make_trainer
from ppo_jax.cli import main
from ppo_jax.population.member import make_member
from ppo_jax.population.plan import make_plan, shard_of
from ppo_jax.population.proposals import make_proposals
from ppo_jax.population.search_space import Choice, LogUniform, Uniform, parse, rows
from ppo_jax.runs import compiled_population, device_memory
from ppo_jax.runs import report as reports
from ppo_jax.runs.lock import owned
from ppo_jax.runs.sweep_merge import merge
from ppo_jax.runs.sweep_plots import write_plots
from ppo_jax.runs.sweep_store import SweepStore

CONFIG = Config(num_envs=2, num_steps=16, hidden_sizes=(8,), total_timesteps=6 * 32)
RATES = [1e-4, 3e-3, 1e-3]
sweep = functools.partial(ppo_jax.sweep, eval_episodes=4, num_rows=3, progress=False)


@functools.cache
def done(chunk=4):
    return sweep(CONFIG, {"learning_rate": RATES}, seeds=2, chunk=chunk)


def test_a_grid_has_every_combination_once_in_order():
    found = rows({"gamma": [0.9, 0.99], "num_steps": [8, 16, 32]})
    assert len(found) == 6
    assert [tuple(row.values()) for row in found][:4] == [(0.9, 8), (0.9, 16), (0.9, 32), (0.99, 8)]
    assert rows([{"gamma": 0.9}, {"num_steps": 8}]) == [{"gamma": 0.9}, {"num_steps": 8}]
    assert rows({}) == [{}]


@pytest.mark.parametrize("sampler", ["random", "sobol"])
def test_draws_follow_their_distributions(sampler):
    space = {
        "learning_rate": LogUniform(1e-5, 1e-1),
        "gamma": Uniform(0.9, 1.0),
        "activation": Choice(("relu", "tanh")),
    }
    table = pd.DataFrame(rows(space, num_draws=1000, sampler=sampler))
    assert list(table.columns) == list(space)
    for column, (low, high) in {"gamma": (0.9, 1.0), "learning_rate": (-5.0, -1.0)}.items():
        values = table[column] if column == "gamma" else np.log10(table[column])
        assert scipy.stats.kstest(values, scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3
    assert 450 < (table["activation"] == "relu").sum() < 550
    again = pd.DataFrame(rows(space, num_draws=1000, sampler=sampler))
    pd.testing.assert_frame_equal(table, again)


@pytest.mark.parametrize(
    ("space", "draws", "message"),
    [
        ({"learning_rat": [1.0]}, None, "unknown name in the space 'learning_rat'. Did you mean"),
        ([{"gama": 1.0}], None, "unknown name in the space 'gama'"),
        ({"gamma": []}, None, "every list of a space must hold a value; gamma holds none"),
        ({"gamma": 0.9}, None, r"a space maps names to lists .*got gamma=0.9. Write \[0.9\]"),
        ({"env": "CartPole-v1"}, None, "a space maps names to lists .*got env='CartPole-v1'"),
        ({"gamma": [0.9]}, 3, r"num_draws \(--draws\) must be given if and only if .* got 3"),
        ({"gamma": Uniform(0.0, 1.0)}, None, "got None and gamma"),
        ([{"gamma": 0.9}], 3, "num_draws needs distributions"),
        ({"gamma": Uniform(0.0, 1.0)}, 0, "num_draws must be a positive integer; got 0"),
        ({"hidden_sizes": [64, 64]}, None, r"must differ; .* two layers of 64 units are \(64, 64"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(space, draws, message):
    with pytest.raises(ConfigError, match=message):
        rows(space, num_draws=draws)


def test_entries_of_a_command_line():
    assert parse("1e-4,3e-4") == [1e-4, 3e-4]
    assert parse("uniform(0.9,1)") == Uniform(0.9, 1)
    assert parse("choice(relu,tanh)") == Choice(("relu", "tanh"))
    assert parse("none,true,64x64") == [None, True, (64, 64)]
    assert parse([0.1, "1e-3", [64, 64]]) == [0.1, 1e-3, (64, 64)]
    assert parse({"eps": "1e-5"}) == [{"eps": 1e-5}]
    with pytest.raises(ConfigError, match="uniform takes a low and a high value"):
        parse("uniform(1)")
    with pytest.raises(ConfigError, match="needs 0 < low < high; got 0 and 1"):
        parse("loguniform(0,1)")


def test_whole_episodes_must_fit_whatever_is_swept():
    config = CONFIG.replace(algorithm="reinforce", env_params={"max_steps_in_episode": 16})
    with pytest.raises(ConfigError, match="num_steps must be at least the longest.*got 16 and 20"):
        sweep(config, {"env_params.max_steps_in_episode": [10, 20]})


def test_none_switches_a_bound_off_or_is_refused():
    make_plan(Config(), HParams(), [{"value_clip_eps": None}], seeds=(0,))
    message = "None leaves max_grad_norm to the algorithm, whose value is 0.5. Write inf"
    with pytest.raises(ConfigError, match=message):
        make_plan(Config(), HParams(), [{"max_grad_norm": None}], seeds=(0,))


def test_only_what_is_compiled_in_makes_groups():
    space = {
        "gamma": [0.9, 0.99],
        "num_steps": [16, 32],
        "value_clip_eps": [None, 0.2],
        "env_params.gravity": [9.8, 12.0],
    }
    plan = make_plan(CONFIG, HParams(), rows(space), seeds=(3, 5))
    assert len(plan) == 4
    members = [member for group in plan for member in group.members]
    assert sorted(member.number for member in members) == list(range(32))
    for group in plan:
        for member in group.members:
            assert group.config.num_steps == member.row["num_steps"]
            assert member.hparams.gamma == member.row["gamma"]
            assert member.env_params == {"gravity": member.row["env_params.gravity"]}
            assert member.seed == (3, 5)[member.number % 2]


def test_a_member_is_the_single_run():
    result = done()
    trainer = make_trainer(CONFIG)
    run = jax.jit(trainer.run)
    for number, rate in enumerate(RATES):
        _, metrics = run(jax.random.key(1), HParams(learning_rate=rate))
        curve = result.curves[result.curves["member"] == 2 * number + 1]
        assert list(curve["update"]) == [2, 4, 6]
        assert list(curve["timesteps"]) == [64, 128, 192]
        assert (curve["learning_rate"] == rate).all()
        entropy = np.asarray(metrics["train/entropy"]).reshape(3, 2).mean(1)
        np.testing.assert_allclose(curve["train/entropy"], entropy, rtol=1e-3)
        count = np.asarray(metrics["episode/count"]).reshape(3, 2)
        total = np.nansum(np.asarray(metrics["episode/return"]).reshape(3, 2) * count, axis=1)
        np.testing.assert_array_equal(curve["episode/count"], count.sum(1))
        np.testing.assert_allclose(curve["episode/return"], total / count.sum(1), rtol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    # Without the emitters of fused loops, which users have, metrics round differently.
    options = {"xla_cpu_use_fusion_emitters": True}
    compile_exactly = functools.partialmethod(jax.stages.Lowered.compile, options)
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_exactly)
    one, other = done.__wrapped__(4), done.__wrapped__(2)
    pd.testing.assert_frame_equal(one.members, other.members, check_exact=True)
    pd.testing.assert_frame_equal(one.curves, other.curves, check_exact=True)


@pytest.mark.slow
def test_chunks_change_nothing_as_users_compile():
    code = (
        "import pandas as pd\nfrom tests import test_sweep as t\n"
        "pd.testing.assert_frame_equal(t.done(4).curves, t.done(2).curves, check_exact=True)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=3"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, env=environment)


def test_a_chunk_is_no_larger_than_its_group():
    said = []
    sweep(CONFIG, {"learning_rate": RATES[:2]}, seeds=1, chunk=64, say=said.append)
    assert said[-1].startswith("2 members together")


def test_a_member_that_fails_is_frozen_and_the_others_are_untouched():
    rates = [RATES[0], 1e38, RATES[2]]
    result = sweep(CONFIG, {"learning_rate": rates}, seeds=2, chunk=4)
    failed = result.members["learning_rate"] == 1e38
    # In three consecutive updates, half of the six, every step was skipped.
    assert result.members.loc[failed, "failed_at"].isin([2, 3]).all()
    assert result.members.loc[~failed, "failed_at"].isna().all()
    assert np.isfinite(result.members["eval/return"]).all()
    kept = result.members["configuration"] != 1
    pd.testing.assert_frame_equal(
        result.members[kept], done().members[kept], check_exact=True, check_dtype=False
    )


def test_a_sweep_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    add = SweepStore.add
    calls = []

    def cut_off(store, tables):
        if len(calls) == 1:
            raise RuntimeError("the power went")
        calls.append(tables)
        add(store, tables)

    again = functools.partial(
        sweep, CONFIG, {"learning_rate": RATES}, seeds=2, chunk=4, run_dir=tmp_path / "run"
    )
    with monkeypatch.context() as patch:
        patch.setattr(SweepStore, "add", cut_off)
        with pytest.raises(RuntimeError, match="the power went"):
            again()
    # A file that was being written when the power went is no result.
    (tmp_path / "run" / "parts" / ".members-000004.parquet.unfinished").write_text("")
    said = []
    result = again(say=said.append)
    assert said[0] == "6 members in 1 group, 4 of them done already: 1 compilation, 384 steps to go"
    pd.testing.assert_frame_equal(result.members, done().members, check_dtype=False)
    pd.testing.assert_frame_equal(result.curves, done().curves, check_dtype=False)
    read = pd.read_parquet(tmp_path / "run" / "curves.parquet")
    pd.testing.assert_frame_equal(read, result.curves)
    assert len(pd.read_csv(tmp_path / "run" / "members.csv")) == 6
    for changes, what in (({"seeds": 3}, "seeds"), ({"eval_episodes": 9}, "eval_episodes")):
        with pytest.raises(ConfigError, match=rf"holds another \({what} differ\)"):
            again(**changes)


SPACE = {"learning_rate": RATES, "num_steps": [16, 32]}


def shards_of(count, folder, indices=None):
    for i in indices or range(1, count + 1):
        run_dir = folder / f"shard{i}"
        result = sweep(CONFIG, SPACE, seeds=2, chunk=4, shard=(i, count), run_dir=run_dir)
        assert result.is_complete
        yield run_dir


def test_shares_of_a_sweep_are_merged_into_what_one_machine_has(tmp_path, capsys):
    whole = sweep(CONFIG, SPACE, seeds=2, chunk=4, run_dir=tmp_path / "whole")
    shards = list(shards_of(3, tmp_path))
    assert [len(pd.read_parquet(path / "members.parquet")) for path in shards] == [4, 4, 4]
    merged = tmp_path / "merged"
    # In any order, and in two steps.
    assert main(["merge", str(shards[2]), str(shards[0]), "-o", str(merged)]) == 1
    assert "4 members are missing" in capsys.readouterr().out
    assert main(["merge", *map(str, shards), "-o", str(merged)]) == 0
    for name in ("members", "curves"):
        found, expected = (
            pd.read_parquet(path / f"{name}.parquet") for path in (merged, tmp_path / "whole")
        )
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    evaluation = json.loads((merged / "best" / "evaluation.json").read_text())
    assert evaluation == json.loads((tmp_path / "whole" / "best" / "evaluation.json").read_text())
    assert ppo_jax.load(merged / "best").spec == whole.best_policy.spec
    # The sweep without a shard has nothing left to do there.
    again = sweep(CONFIG, SPACE, seeds=2, run_dir=merged)
    assert again.is_complete
    assert again.run_seconds == 0.0


def test_chunks_of_a_share_are_as_large_as_those_of_the_whole_sweep():
    plan = make_plan(CONFIG, HParams(), rows(SPACE), seeds=(0, 1))
    assert [(len(g.members), g.size) for g in shard_of(plan, 2, 3)] == [(2, 6), (2, 6)]


@pytest.mark.filterwarnings("default:best in")  # which the command shows as a line
def test_a_merge_that_cannot_write_says_so_and_is_repeated(tmp_path, monkeypatch, capsys):
    (shard,) = shards_of(3, tmp_path, indices=[2])
    command = ["merge", str(shard), "-o", str(tmp_path / "merged")]

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    assert main(command) == 1
    assert "error: best in" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 1  # members are missing
    assert "8 members are missing" in capsys.readouterr().out
    assert ppo_jax.load(tmp_path / "merged" / "best")


def test_members_that_a_lost_machine_did_not_train_are_trained_after_the_merge(tmp_path):
    (shard,) = shards_of(3, tmp_path, indices=[2])
    found = merge([shard], tmp_path / "merged")
    assert found == (4, 8, False, ())
    result = sweep(CONFIG, SPACE, seeds=2, run_dir=tmp_path / "merged")
    assert result.is_complete
    assert len(result.members) == 12


def test_shares_that_do_not_belong_together_are_refused(tmp_path):
    first, second = shards_of(3, tmp_path, indices=[1, 2])
    other = tmp_path / "other"
    sweep(CONFIG, SPACE, seeds=[5, 6], shard=(1, 3), run_dir=other)
    of_four = tmp_path / "four"
    sweep(CONFIG, SPACE, seeds=2, shard=(1, 4), run_dir=of_four)
    whole = tmp_path / "whole"
    sweep(CONFIG, {"gamma": [0.9]}, seeds=2, run_dir=whole)
    for shards, message in (
        ([first, other], "shards must be of one sweep; .* differ in seeds"),
        ([first, of_four], "shards must be of one sweep; .* differ in shards"),
        ([first, first], "a shard must be given once; .* are both shard 1 of 3"),
        ([first, whole], "merge needs shards of a sweep; .* is a whole one"),
        ([first, tmp_path / "nowhere"], "there must be a sweep in .*nowhere; found none"),
        ([], "merge needs the directories of shards"),
    ):
        with pytest.raises(ConfigError, match=message):
            merge(shards, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ConfigError, match="another .*differ"):
        merge([first], whole)
    for shard in (None, (2, 3)):
        with pytest.raises(ConfigError, match=r"hold the same sweep.*\(shard differ\)"):
            sweep(CONFIG, SPACE, seeds=2, shard=shard, run_dir=first)
    with pytest.raises(ConfigError, match="none of the shards; got .*Choose a new one"):
        merge([first, second], first)
    with pytest.raises(ConfigError, match="one process at a time"), owned(second):
        merge([first, second], tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard": (0, 3)}, "the number of a shard must be a positive integer; got 0"),
        ({"shard": (4, 3)}, "i from 1 to n.*got 4/3 and 6 members"),
        ({"shard": (1, 7)}, "n at most the number of members; got 1/7"),
    ],
)
def test_a_share_that_does_not_exist_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sweep(CONFIG, {"learning_rate": RATES}, seeds=2, **arguments)


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": 3},
        {"shard": [1, "3"]},
        {"shard": [4, 3]},
        {"seeds": None},
        {"configurations": None},
    ],
)
def test_a_damaged_description_of_a_share_is_refused(changes, tmp_path):
    description = {"seeds": [0], "shard": [1, 3], "configurations": [{}], **changes}
    (tmp_path / "sweep.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="merge needs shards of a sweep; .* damaged, or"):
        merge([tmp_path], tmp_path / "merged")


@pytest.mark.parametrize("text", ["3", "3/", "a/b", "-1/2", "1/2/3"])
def test_a_share_is_two_numbers(text, capsys):
    assert main(["sweep", "--gamma", "0.9,0.99", "--shard", text]) == 2
    assert "--shard must be i/n" in capsys.readouterr().err


def test_a_sweep_killed_as_it_began_can_begin_again(tmp_path):
    (tmp_path / ".sweep.json.unfinished").write_text("{")
    (tmp_path / ".lock").write_text("")
    for _ in range(2):
        with SweepStore.opened(tmp_path, {"seeds": [0]}) as store:
            assert store.finished() == set()
            assert store.path == tmp_path


def test_values_of_every_kind_are_swept(tmp_path):
    space = [
        {"hidden_sizes": (4, 4), "env_params.gravity": 9},
        {"hidden_sizes": (4, 4), "env_params.gravity": 9.8},
        {"hidden_sizes": 4, "env_params.gravity": np.float32(9.8)},
    ]
    result = sweep(CONFIG, space, seeds=1, chunk=1, run_dir=tmp_path / "run")
    assert list(result.members["hidden_sizes"].astype(str)) == ["4x4", "4x4", "4"]
    members, curves = reports.load_tables(tmp_path / "run")
    report = reports.make_report(members, curves)
    assert write_plots(members, curves, report, tmp_path)


def test_a_report_of_a_sweep_without_episodes_is_drawn(tmp_path):
    members, curves = make_tables()
    curves["episode/return"] = np.nan
    report = reports.make_report(members, curves)
    assert write_plots(members, curves, report, tmp_path)


DRAWN = {"learning_rate": LogUniform(1e-5, 1e-1), "ent_coef": Choice((0.0, 0.01, 0.1))}


def test_later_batches_follow_what_did_well():
    proposals = make_proposals(DRAWN, num_draws=64, sampler="tpe", batch=16)
    batches = []
    while asked := proposals.ask():
        rows = list(asked.values())
        batches.append(rows)
        rates = np.array([row["learning_rate"] for row in rows])
        costs = np.array([row["ent_coef"] for row in rows])
        proposals.tell(list(-np.square(np.log10(rates) + 2.0) - costs))
    assert [len(rows) for rows in batches] == [16] * 4

    def distance(rows):
        return np.mean([abs(np.log10(row["learning_rate"]) + 2.0) for row in rows])

    assert distance(batches[-1]) < 0.5 * distance(batches[0])
    assert all(1e-5 <= row["learning_rate"] <= 1e-1 for rows in batches for row in rows)


def test_a_score_that_is_no_number_is_the_worst():
    """Optuna takes it for a trial that failed, for which another one would be drawn."""
    proposals = make_proposals(DRAWN, num_draws=3, sampler="tpe", batch=1)
    numbers = []
    while asked := proposals.ask():
        numbers += asked
        proposals.tell([float("nan")])
    assert numbers == [0, 1, 2]


def test_seeds_and_sizes_of_numpy_are_numbers(tmp_path):
    arguments = {"eval_episodes": np.int64(2), "hparams": HParams(ent_coef=np.float32(0.01))}
    again = functools.partial(sweep, CONFIG, {"gamma": [0.9]}, run_dir=tmp_path, **arguments)
    assert list(again(seeds=np.arange(2)).members["seed"]) == [0, 1]
    assert again(seeds=np.int64(2)).run_seconds == 0.0  # the same sweep


def test_what_a_later_batch_may_draw_is_checked_before_anything_is_written(tmp_path):
    for space, message in (
        ({"gamma": Uniform(0.9, 1.1)}, r"gamma must be in \[0, 1\]; got 1.1"),
        ({"num_minibatches": Choice((4, 3))}, "divisible by num_minibatches.*and 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            sweep(CONFIG, space, num_draws=2, sampler="tpe", batch=1, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_range_and_a_choice_hold_something():
    with pytest.raises(ConfigError, match="needs low < high; got 0.99 and 0.9"):
        Uniform(0.99, 0.9)
    with pytest.raises(ConfigError, match="one or more values"):
        Choice(())


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_sweep_in_batches_is_compiled_once_and_goes_on_where_it_was_cut_off(
    chunk, tmp_path, monkeypatch
):
    again = functools.partial(
        sweep, CONFIG, DRAWN, seeds=2, num_draws=5, sampler="tpe", batch=2, chunk=chunk
    )
    said = []
    whole = again(say=said.append)
    assert [line for line in said if "compilation" in line] == [
        "4 members in 1 group: 1 compilation, 768 steps to go",
        "4 members in 1 group: 0 compilations, 768 steps to go",
        "2 members in 1 group: 0 compilations, 384 steps to go",
    ]
    assert said[-2] == "configurations 4 to 4 of 5:"
    assert list(whole.members["configuration"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert whole.is_complete

    add = SweepStore.add

    def cut_off(store, tables):
        if len(store.parts) == (1 if chunk is None else 3):  # after, or within, a batch
            raise RuntimeError("the power went")
        add(store, tables)

    with monkeypatch.context() as patch:
        patch.setattr(SweepStore, "add", cut_off)
        with pytest.raises(RuntimeError, match="the power went"):
            again(run_dir=tmp_path / "run")
    resumed = again(run_dir=tmp_path / "run")
    pd.testing.assert_frame_equal(resumed.members, whole.members, check_dtype=False)
    pd.testing.assert_frame_equal(resumed.curves, whole.curves, check_dtype=False)
    # A sampler of another version may ask for something else.
    part = tmp_path / "run" / "parts" / "members-000000.parquet"
    pd.read_parquet(part).assign(learning_rate=0.5).to_parquet(part)
    with pytest.raises(ConfigError, match="must hold the configurations that the sampler asks for"):
        again(run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": [{"gamma": 0.9}]}, "needs a space of distributions; got a list of rows"),
        ({"space": {"gamma": [0.9]}}, r"needs a distribution for every name; gamma is \[0.9\]"),
        ({"num_draws": None}, r"num_draws \(--draws\) must be given"),
        ({"batch": None}, "needs a batch of at least 1 configuration; got None"),
        ({"sampler": "sobol"}, "batch is for sampler tpe.*got 2 and sobol"),
        ({"sampler": "tps"}, "unknown sampler 'tps'. Did you mean tpe"),
        ({"space": {}, "num_draws": None}, "needs something to draw; the space is empty"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(arguments, message):
    fields = {"space": DRAWN, "num_draws": 4, "sampler": "tpe", "batch": 2} | arguments
    with pytest.raises(ConfigError, match=message):
        make_proposals(**fields)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="run_dir must be new, empty or a sweep"):
        sweep(CONFIG, {}, run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_does_not_fit_runs_in_smaller_chunks(monkeypatch):
    said = []
    limit = iter([1.0])
    monkeypatch.setattr(device_memory, "limit", lambda device: next(limit, None))
    result = sweep(CONFIG, {"learning_rate": RATES}, seeds=2, say=said.append)
    assert any("continuing with 1 at a time" in line for line in said)
    assert len(result.members) == 6
    np.testing.assert_allclose(
        result.curves["train/entropy"], done().curves["train/entropy"], rtol=1e-3
    )


def make_tables():
    """Three configurations of eight seeds with known returns."""
    rng = np.random.default_rng(0)
    members, curves = [], []
    for configuration, (rate, mean) in enumerate([(1e-3, 10.0), (1e-2, 30.0), (1e-1, 20.0)]):
        for seed in range(8):
            label = {"member": len(members), "configuration": configuration, "seed": seed}
            label |= {"learning_rate": rate, "gamma": 0.9}
            value = mean + rng.normal()
            members.append({**label, "timesteps": 9, "eval/return": value, "failed_at": None})
            for update, share in enumerate((0.0, 0.5, 1.0)):
                curves.append(
                    {
                        **label,
                        "update": update,
                        "timesteps": 3 * update,
                        "episode/return": share * value,
                    }
                )
    return pd.DataFrame(members), pd.DataFrame(curves)


def test_a_report_finds_the_best_and_says_how_sure_it_is(tmp_path):
    members, curves = make_tables()
    report = reports.make_report(members, curves)
    table = report.configurations
    assert list(table["learning_rate"]) == [1e-2, 1e-1, 1e-3]
    for _, row in table.iterrows():
        own = members.loc[members["configuration"] == row["configuration"], "eval/return"]
        middle = np.sort(own)[2:6].mean()  # the middle half of eight
        np.testing.assert_allclose(row["iqm"], middle)
        assert own.min() < row["low"] < row["iqm"] < row["high"] < own.max()
        np.testing.assert_allclose(row["area"], own.mean() / 2)
    assert report.improvement.estimate == 1.0
    first = report.sensitivity.iloc[0]
    assert (first["name"], first["best"], first["worst"]) == ("learning_rate", "0.01", "0.001")
    assert report.sensitivity.iloc[1]["difference"] == 0
    written = write_plots(members, curves, report, tmp_path)
    assert {path.suffix for path in written} == {".png", ".svg"}
    assert all(path.stat().st_size > 5_000 for path in written)


def test_the_interval_is_the_percentiles_of_resampled_seeds():
    x = np.random.default_rng(3).normal(size=20)
    ours = reports.interval(x)
    picked = np.random.default_rng(1).integers(20, size=(5000, 20))
    middle = np.sort(x[picked], axis=1)[:, 5:15].mean(axis=1)
    np.testing.assert_allclose(ours[1:], np.percentile(middle, [2.5, 97.5]), atol=0.06)
    assert np.isnan(reports.interval(x[:1])[1:]).all()


def table_of(values, seeds, score):
    """Members and curves of configurations with given values; `score(row, seed)` is the return."""
    members, curves = [], []
    for configuration, row in enumerate(values):
        for seed in range(seeds):
            number = configuration * seeds + seed
            label = {"member": number, "configuration": configuration, "seed": seed, **row}
            value = score(row, seed)
            members.append({**label, "timesteps": 6, "eval/return": value, "failed_at": None})
            curves += [
                {**label, "update": u, "timesteps": 500_000 * u, "episode/return": value * u}
                for u in (1, 2, 3)
            ]
    return pd.DataFrame(members), pd.DataFrame(curves)


DRAWS = np.random.default_rng(0)
SPACES = {
    "nothing": [{}],
    "one-list": [{"gamma": g} for g in (0.9, 0.95, 0.99)],
    "one-drawn": [{"learning_rate": r} for r in 10.0 ** DRAWS.uniform(-4, -1, 16)],
    "words": [{"algorithm": a} for a in ("ppo", "spo", "dpo")],
    "two-lists": [{"gamma": g, "num_steps": n} for g in (0.9, 0.99) for n in (16, 32, 64)],
    "two-drawn": [
        {"learning_rate": r, "ent_coef": e}
        for r, e in zip(10.0 ** DRAWS.uniform(-4, -1, 16), DRAWS.uniform(0, 0.1, 16), strict=True)
    ],
    "four": [
        {"learning_rate": r, "ent_coef": e, "activation": a, "layer_norm": bool(i % 2)}
        for i, (r, e, a) in enumerate(
            zip(
                10.0 ** DRAWS.uniform(-4, -1, 16),
                DRAWS.uniform(0, 0.1, 16),
                ["tanh", "relu"] * 8,
                strict=True,
            )
        )
    ],
}


def test_a_report_without_a_score_has_no_best_value():
    values = [{"gamma": 0.9}, {"gamma": 0.99}]
    report = reports.make_report(*table_of(values, 2, lambda row, seed: float("nan")))
    assert list(report.sensitivity["name"]) == ["gamma"]
    assert "best" not in report.sensitivity


@pytest.mark.parametrize("seeds", [1, 6])
@pytest.mark.parametrize("space", SPACES)
def test_every_kind_of_space_is_reported_and_drawn(space, seeds, tmp_path):
    values = SPACES[space]

    def score(row, seed):
        return 100.0 * row.get("learning_rate", 0.1) + row.get("gamma", 0.0) + 0.01 * seed

    members, curves = table_of(values, seeds, score)
    report = reports.make_report(members, curves)
    assert len(report.sensitivity) == len(values[0])
    # One seed proves nothing; from five on there is a probability.
    assert (report.improvement is not None) == (seeds == 6 and len(values) > 1)
    if "learning_rate" in values[0]:
        first = report.sensitivity.iloc[0]
        assert first["name"] == "learning_rate"
        assert first["rank_correlation"] == pytest.approx(1.0)
        assert (report.sensitivity["effect"] <= 1.0 + 1e-9).all()
    written = write_plots(members, curves, report, tmp_path)
    assert all(path.stat().st_size > 4_000 for path in written)


def test_too_few_draws_tell_nothing():
    members, curves = table_of(SPACES["two-drawn"][:6], 2, lambda row, seed: row["ent_coef"])
    report = reports.make_report(members, curves)
    assert report.sensitivity["effect"].isna().all()


def test_the_probability_of_improvement_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.5, 1.0, 12), rng.normal(0.0, 1.0, 9)
    ours = reports.probability_of_improvement(x, y)
    np.testing.assert_allclose(ours.estimate, scipy.stats.mannwhitneyu(x, y).statistic / (12 * 9))
    assert ours.low < ours.estimate < ours.high


def test_the_commands(tmp_path, capsys):
    file = tmp_path / "space.yaml"
    file.write_text("env_params.gravity: [9.8, 12.0]\nlearning_rate: loguniform(1e-4,1e-2)\n")
    run_dir = tmp_path / "run"
    arguments = ["sweep", "CartPole-v1", "--config", str(file), "--seeds", "2", "--draws", "2"]
    arguments += ["--num-envs", "2", "--num-steps", "16", "--hidden-sizes", "8x8"]
    arguments += ["--total-timesteps", "64", "--eval-episodes", "2", "--run-dir", str(run_dir)]
    assert main(arguments) == 0
    seen = capsys.readouterr()
    assert "8 members in 1 group: 1 compilation, 512 steps to go" in seen.err
    assert "configurations, the best first" in seen.out
    record = json.loads((run_dir / "sweep.json").read_text())
    assert record["config"]["hidden_sizes"] == "8x8"
    assert len(record["configurations"]) == 4
    assert main(["report", str(run_dir)]) == 0
    assert main(["report", str(tmp_path)]) == 2
    assert "must hold members.parquet" in capsys.readouterr().err


def test_a_population_of_keys_and_values_is_one_call():
    """The documented one-liner: seeds by vmap over keys, values by vmap over HParams."""
    train = jax.vmap(ppo_jax.make_train(CONFIG), in_axes=(None, 0))
    _, metrics = jax.jit(train)(jax.random.key(1), HParams(learning_rate=jnp.array(RATES)))
    curves = done().curves
    for number in range(3):
        own = curves[curves["member"] == 2 * number + 1]["train/entropy"]
        mean = np.asarray(metrics["train/entropy"][number]).reshape(3, 2).mean(1)
        np.testing.assert_allclose(own, mean, rtol=1e-4)


KILLED = """
import jax, sys, ppo_jax
from tests.test_sweep import CONFIG, RATES
from tests import conftest
ppo_jax.sweep(CONFIG, {"learning_rate": RATES}, seeds=8, chunk=2, eval_episodes=4, num_rows=3,
              progress=False, run_dir=sys.argv[1])
"""


@pytest.mark.slow
def test_a_sweep_killed_ten_times_ends_as_one_that_was_not(tmp_path):
    rng = np.random.default_rng(0)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    kills = 0
    while kills < 10:
        process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
        parts = tmp_path / "killed" / "parts"
        before = len(list(parts.glob("*"))) if parts.exists() else 0
        # Once something new is being written, or at a random moment before.
        give_up = time.monotonic() + rng.uniform(5, 60)
        while time.monotonic() < give_up and process.poll() is None:
            if parts.exists() and len(list(parts.glob("*"))) > before:
                time.sleep(rng.uniform(0, 0.02))
                break
            time.sleep(0.001)
        if process.poll() is not None:
            break  # nothing is left to kill
        process.kill()
        process.wait()
        kills += 1
    assert kills > 3
    again = functools.partial(sweep, CONFIG, {"learning_rate": RATES}, seeds=8, chunk=2)
    killed, whole = again(run_dir=tmp_path / "killed"), again()
    assert list(killed.members["member"]) == list(range(24))
    pd.testing.assert_frame_equal(killed.members, whole.members, check_dtype=False)
    pd.testing.assert_frame_equal(killed.curves, whole.curves, check_dtype=False)


def test_the_best_policy_of_a_sweep_is_kept_and_is_a_run(tmp_path):
    space = {"learning_rate": RATES, "env_params.gravity": [9.8, 12.0]}
    path = tmp_path / "run"
    result = sweep(CONFIG, space, seeds=2, chunk=4, run_dir=path)
    best = result.members.loc[result.members["eval/return"].idxmax()]
    record = json.loads((path / "best" / "evaluation.json").read_text())
    assert record["eval/return"] == pytest.approx(best["eval/return"])
    assert record["member"] == best["member"]
    described = json.loads((path / "best" / "config.json").read_text())
    assert described["seeds"] == best["seed"]
    assert described["hparams"]["learning_rate"] == best["learning_rate"]
    assert dict(described["config"]["env_params"])["gravity"] == best["env_params.gravity"]
    # It is the policy of that member: trained alone it is the same, to rounding.
    policy = ppo_jax.load(path / "best")
    config = CONFIG.replace(env_params={"gravity": best["env_params.gravity"]})
    run = jax.jit(make_trainer(config).run)
    state, _ = run(jax.random.key(int(best["seed"])), HParams(learning_rate=best["learning_rate"]))
    for kept, alone, held in zip(
        *map(jax.tree.leaves, (policy.params, state.learner.params, result.best_policy.params)),
        strict=True,
    ):
        np.testing.assert_allclose(kept, alone, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(kept, held)
    assert main(["eval", str(path / "best"), "--episodes", "2"]) == 0
    # A sweep that goes on knows the best so far, also one that was being replaced.
    os.rename(path / "best", path / ".best.replaced")
    again = sweep(CONFIG, space, seeds=2, chunk=4, run_dir=path)
    for kept, held in zip(
        *map(jax.tree.leaves, (again.best_policy.params, policy.params)), strict=True
    ):
        np.testing.assert_array_equal(kept, held)
    assert (path / "best" / "config.json").is_file()


def test_a_sweep_shows_progress_within_a_chunk_and_stops_there(monkeypatch):
    """Pieces of one update: a chunk of many is left after the piece in which Ctrl-C came."""
    monkeypatch.setattr("ppo_jax.runs.pieces._SECONDS", 0.0)
    (group,) = make_plan(CONFIG, HParams(), rows({"learning_rate": RATES}), seeds=(0, 1))
    trainer = make_trainer(group.config)
    member = make_member(trainer, max_skipped_updates=10, num_updates=6, num_rows=3, num_episodes=2)
    population = compiled_population.CompiledPopulation(
        member,
        trainer.env,
        mesh=ppo_jax.make_mesh(),
        num_updates=6,
        may_shrink=True,
        say=lambda line: None,
    )
    pieces = []

    def chunks(stop_after):
        pieces.clear()
        return list(
            population.chunks(
                group.members,
                6,
                is_stopped=lambda: len(pieces) >= stop_after,
                on_piece=lambda count, piece: pieces.append((count, piece.updates)),
            )
        )

    assert chunks(stop_after=3) == []
    assert pieces == [(6, 1)] * 3
    (chunk,) = chunks(stop_after=100)
    assert pieces == [(6, 1)] * 6
    # The same numbers as in one piece.
    monkeypatch.setattr("ppo_jax.runs.pieces._SECONDS", 1e9)
    (whole,) = chunks(stop_after=100)
    assert len(pieces) < 6
    for x, y in zip(jax.tree.leaves(chunk.outcome), jax.tree.leaves(whole.outcome), strict=True):
        np.testing.assert_array_equal(x, y)
