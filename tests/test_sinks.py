"""Sinks get the rows of a run, and none of them can harm it."""

import json
import struct
import sys
import time

import numpy as np
import pandas as pd
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, cli, resume
from ppo_jax.runs import periodic_evaluation, sink
from ppo_jax.runs.sink import Sink
from ppo_jax.runs.sinks import make_sinks
from ppo_jax.runs.trackers import TRACKERS
from tests.test_checkpoint import assert_same_bits
from tests.test_resume import rows_of

CONFIG = Config(num_envs=4, num_steps=16, total_timesteps=64 * 20, hidden_sizes=(8,))
SEEDS = (3, 4)


def train(**arguments):
    common = {"log_every": 4, "eval_every": 8, "eval_episodes": 4, "progress": False}
    return ppo_jax.train(CONFIG, seed=SEEDS[0], num_seeds=2, **{**common, **arguments})


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run with all sinks, and the rows that its callback got."""
    calls = []
    path = tmp_path_factory.mktemp("sinks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        store_locally(patch, path.parent)
        run = train(run_dir=path, log=tuple(TRACKERS), on_rows=calls.append)
    return run, calls


def store_locally(patch, folder):
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    # Trackio reads the variable when it is imported, and keeps what it read in several modules.
    import trackio

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
            patch.setattr(module, "TRACKIO_DIR", folder / "trackio")
    assert folder / "trackio" == trackio.utils.TRACKIO_DIR


def metrics_of(row):
    return {name: x for name, x in row.items() if "/" in name}


def test_a_callback_gets_the_rows_of_all_files_in_order(logged):
    run, calls = logged
    rows = [row for call in calls for row in call]
    assert all(calls)
    # Each file has its rows in order. The last rows are those of the final evaluation.
    files = {
        name: [json.loads(line) for line in (run.run_dir / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    }
    *rows, first, second = rows
    assert [row for row in rows if "eval/return" not in row] == files["metrics.jsonl"]
    assert [row for row in rows if "eval/return" in row] == files["evaluations.jsonl"]
    assert [row["update"] for row in rows] == sorted(row["update"] for row in rows)
    assert [(row["update"], row["timesteps"], row["seed"]) for row in (first, second)] == [
        (20, 20 * 64, seed) for seed in SEEDS
    ]
    returns = np.mean(run.evaluation.returns, axis=1)
    np.testing.assert_allclose([first["eval/return"], second["eval/return"]], returns)


def test_every_row_says_how_long_the_training_took(logged):
    run, calls = logged
    seconds = run.metrics.groupby("seed")["time/seconds"].apply(list)
    for times in seconds:
        assert times == sorted(times)
        assert times[0] > 0
        # Between two pieces a run takes a little longer than the pieces themselves.
        assert times[-1] <= run.run_seconds
    assert calls[-1][0]["time/seconds"] == seconds[SEEDS[0]][-1]


def test_the_rows_are_a_table_as_well(logged):
    run, _ = logged
    table = pd.read_csv(run.run_dir / "metrics.csv")
    pd.testing.assert_frame_equal(table, run.metrics, check_exact=True, check_dtype=False)


def tensorboard_events(folder):
    """Yields the events of a folder; TFRecord: length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_has_the_rows_of_each_seed(logged):
    run, calls = logged
    for seed in SEEDS:
        rows = [row for call in calls for row in call if row["seed"] == seed]
        events = list(tensorboard_events(run.run_dir / "tensorboard" / f"seed_{seed}"))
        scalars = [
            (event.step, {value.tag: value.simple_value for value in event.summary.value})
            for event in events
            if event.summary.value and event.summary.value[0].HasField("simple_value")
        ]
        assert [step for step, _ in scalars] == [row["timesteps"] for row in rows]
        for (_, found), row in zip(scalars, rows, strict=True):
            expected = metrics_of(row)
            assert found.keys() == expected.keys()
            np.testing.assert_array_equal(
                list(found.values()), np.array(list(expected.values()), np.float32)
            )
        (settings,) = [
            value.tensor.string_val[0].decode()
            for event in events
            for value in event.summary.value
            if value.tag.startswith("settings")
        ]
        assert '"num_envs": 4' in settings
        assert '"learning_rate"' in settings
        # The tab that compares runs has their hyperparameters.
        plugins = {x.tag: x for event in events for x in event.summary.value if "hparams" in x.tag}
        started = plugins["_hparams_/session_start_info"].metadata.plugin_data.content
        assert b"gae_lambda" in started


def test_a_window_without_an_episode_is_no_point_of_a_tracker():
    row = {
        "update": 1,
        "timesteps": 64,
        "seed": 0,
        "train/entropy": np.nan,
        "episode/return": np.nan,
    }
    assert list(sink.metrics_of(row)) == ["train/entropy"]


def wandb_records(path):
    """Yields the records of a file of W&B: after 7 bytes, parts of records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = path.read_bytes(), 7, b""
    while position + 7 < len(content):
        if 2**15 - position % 2**15 < 7:  # too short for a part
            position += 2**15 - position % 2**15
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(record)
            record = b""


def test_weights_and_biases_has_a_run_for_each_seed(logged):
    run, calls = logged
    found = {}
    for path in (run.run_dir / "wandb").glob("offline-run-*/*.wandb"):
        records = list(wandb_records(path))
        (started,) = {x.run.display_name for x in records if x.HasField("run")}
        points = [
            {item.key or "/".join(item.nested_key): item.value_json for item in x.history.item}
            for x in records
            if x.HasField("history")
        ]
        found[started] = [
            {name: json.loads(x) for name, x in point.items() if not name.startswith("_")}
            for point in points
        ]
        (group,) = {x.run.run_group for x in records if x.HasField("run")}
        assert group == "run"
    assert found.keys() == {f"run/seed_{seed}" for seed in SEEDS}
    for seed in SEEDS:
        rows = [row for call in calls for row in call if row["seed"] == seed]
        expected = [{"timesteps": row["timesteps"], **metrics_of(row)} for row in rows]
        assert found[f"run/seed_{seed}"] == expected


def test_mlflow_has_a_run_for_each_seed(logged):
    from mlflow import MlflowClient

    run, calls = logged
    client = MlflowClient(f"sqlite:///{run.run_dir.parent / 'mlflow.db'}")
    (experiment,) = (x for x in client.search_experiments() if x.name == "ppo_jax")
    found = {x.info.run_name: x for x in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {f"run/seed_{seed}" for seed in SEEDS}
    for seed in SEEDS:
        logged_run = found[f"run/seed_{seed}"]
        assert logged_run.info.status == "FINISHED"
        assert logged_run.data.params["config.num_envs"] == "4"
        assert "hparams.learning_rate" in logged_run.data.params
        rows = [row for call in calls for row in call if row["seed"] == seed]
        for name in ("train/entropy", "eval/return"):
            points = client.get_metric_history(logged_run.info.run_id, name)
            expected = [(row["timesteps"], row[name]) for row in rows if name in row]
            assert [(point.step, point.value) for point in points] == expected


def test_trackio_has_a_run_for_each_seed(logged):
    import sqlite3

    run, calls = logged
    (database,) = (run.run_dir.parent / "trackio").glob("ppo_jax*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step, id")
        points = found.fetchall()
        settings = dict(connection.execute("SELECT run_name, config FROM configs").fetchall())
    for seed in SEEDS:
        rows = [row for call in calls for row in call if row["seed"] == seed]
        own = [
            (step, json.loads(text)) for name, step, text in points if name == f"run/seed_{seed}"
        ]
        assert own == [(row["timesteps"], metrics_of(row)) for row in rows]
        assert json.loads(settings[f"run/seed_{seed}"])["config"]["num_envs"] == 4


def test_a_callback_stops_a_training_which_can_go_on(tmp_path, logged):
    whole, _ = logged
    stopped = train(run_dir=tmp_path / "run", on_rows=lambda rows: rows[-1]["update"] >= 8)
    assert stopped.is_stopped
    assert 8 * 64 <= stopped.timesteps < whole.timesteps
    assert stopped.evaluation is not None
    rest = ppo_jax.resume(tmp_path / "run", progress=False)
    assert not rest.is_stopped
    assert_same_bits(rest.state, whole.state)
    assert rows_of(rest.run_dir) == rows_of(whole.run_dir)
    # Seconds of both parts are added up.
    assert rest.metrics["time/seconds"].is_monotonic_increasing
    assert rest.metrics["time/seconds"].iloc[-1] > stopped.metrics["time/seconds"].iloc[-1]


class Broken(Sink):
    """Fails in one method."""

    def __init__(self, name):
        self.calls = []

        def fail(*arguments):
            self.calls.append(arguments)
            raise OSError("no disk")

        setattr(self, name, fail)
        self.num_finished = 0

    def finish(self):
        self.num_finished += 1


@pytest.mark.parametrize("name", ["start", "on_rows", "finish"])
def test_a_sink_that_fails_ends_alone(name, monkeypatch, tmp_path, logged):
    whole, _ = logged
    broken, rows = Broken(name), []
    monkeypatch.setitem(TRACKERS, "broken", lambda: broken)
    with pytest.warns(RuntimeWarning, match="broken failed and gets no more rows: OSError: no di"):
        run = train(run_dir=tmp_path / "run", log=("broken",), on_rows=rows.extend)
    assert len(broken.calls) == 1
    # Its files are closed, and its runs do not stay open.
    assert broken.num_finished == (name != "finish")
    assert_same_bits(run.state, whole.state)
    assert len(rows) == len(whole.metrics) + len(whole.evaluations) + 2


def test_an_error_of_a_callback_ends_the_training_after_a_checkpoint(tmp_path, logged):
    whole, _ = logged

    def prune(rows):
        if rows[-1]["update"] >= 8:
            raise LookupError("pruned")

    path = tmp_path / "run"
    with pytest.raises(LookupError, match="pruned"):
        train(run_dir=path, on_rows=prune)
    assert not (path / "evaluation.json").exists()
    run = resume(path, progress=False)
    assert 0 < run.timesteps_before < run.timesteps
    assert_same_bits(run.state, whole.state)
    with pytest.raises(LookupError, match="pruned"):
        train(on_rows=prune)


@pytest.mark.parametrize("answer", [3, "yes", np.arange(2), None, False])
def test_only_true_stops_a_training(answer, logged):
    """A function may return the number of bytes that it wrote."""
    whole, _ = logged
    assert train(on_rows=lambda rows: answer).timesteps == whole.timesteps


def test_an_extended_run_continues_in_the_same_tracked_runs(tmp_path, monkeypatch):
    runs = []

    class Recorder(Sink):
        def start(self, run):
            runs.append(run)

    monkeypatch.setitem(TRACKERS, "recorder", Recorder)
    path = tmp_path / "run"
    train(run_dir=path, log=("recorder",), on_rows=lambda rows: True)
    ppo_jax.resume(path, total_timesteps=64 * 24, progress=False)
    time.sleep(1.1)  # runs are told apart by the second of their start
    train(run_dir=path, log=("recorder",), overwrite=True, on_rows=lambda rows: True)
    first, second, other = runs
    assert [run.is_resumed for run in runs] == [False, True, False]
    assert first.id_of(3) == second.id_of(3) != first.id_of(4)
    assert other.id_of(3) != first.id_of(3)


def test_a_training_stops_at_a_return(logged):
    whole, _ = logged
    means = whole.evaluations.groupby("timesteps")["eval/return"].mean()
    run = train(stop_at_return=means.iloc[0])
    assert run.is_stopped
    assert run.timesteps == means.index[0]
    run = train(stop_at_return=1e6)
    assert not run.is_stopped
    assert run.timesteps == whole.timesteps


def test_a_run_goes_on_with_its_sinks(tmp_path):
    path = tmp_path / "run"
    stopped = train(run_dir=path, log=("tensorboard",), on_rows=lambda rows: True)
    ppo_jax.resume(path, progress=False)
    events = list(tensorboard_events(path / "tensorboard" / f"seed_{SEEDS[0]}"))
    assert events[-1].step == CONFIG.total_timesteps
    # TensorBoard hides what an earlier process wrote after the state that is continued.
    (restart,) = [event.step for event in events if event.HasField("session_log")]
    assert restart == stopped.timesteps + 1
    train(run_dir=path, overwrite=True)
    assert not (path / "tensorboard").exists()


def test_the_command_logs_and_stops(tmp_path, capsys):
    path = tmp_path / "run"
    options = "--total-timesteps 1280 --num-envs 4 --num-steps 16 --quiet --eval-episodes 4"
    more = "--log tensorboard, --eval-every 4 --stop-at-return 1"
    arguments = ["train", "CartPole-v1", "--run-dir", str(path), *options.split(), *more.split()]
    assert cli.main(arguments) == 0
    assert "stopped after 256 steps, as asked" in capsys.readouterr().out
    assert (path / "tensorboard" / "seed_0").is_dir()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"log": ("tensorbord",), "run_dir": "x"}, "tensorbord.*[Dd]id you mean.*tensorboard"),
        ({"log": "wandb", "run_dir": "x"}, r"must be a sequence of names; got 'wandb'"),
        ({"log": ("tensorboard",)}, r"log needs the run_dir"),
        ({"stop_at_return": 1.0, "eval_every": None}, "stop_at_return needs evaluations"),
        ({"stop_at_return": float("nan")}, "stop_at_return must be a number; got nan"),
        ({"eval_every": 21}, r"at most the updates of the training; got 21 and 20\. Try 2"),
        ({"eval_every": 21, "run_dir": "x", "resume": True}, "at most the updates .* got 21"),
    ],
)
def test_mistakes_are_named_before_anything_starts(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence):
        train(**arguments)
    assert not list(tmp_path.iterdir())


def test_rows_reach_a_tracker_although_the_training_fails(tmp_path, monkeypatch):
    """The last rows before an error are those that tell its cause."""

    def fail(*arguments, **options):
        raise RuntimeError("no evaluation today")

    monkeypatch.setattr(periodic_evaluation.PeriodicEvaluation, "after", fail)
    with pytest.raises(RuntimeError, match="no evaluation today"):
        train(run_dir=tmp_path / "run", log=("tensorboard",), eval_every=16)
    events = list(tensorboard_events(tmp_path / "run" / "tensorboard" / f"seed_{SEEDS[0]}"))
    steps = [event.step for event in events for x in event.summary.value if x.simple_value]
    assert sorted(set(steps)) == [update * 64 for update in (4, 8, 12)]


def test_a_slow_tracker_does_not_hold_up_the_training(tmp_path, monkeypatch, logged):
    whole, _ = logged
    seconds, taken = 0.5, []

    class Slow(Sink):
        def on_rows(self, rows):
            time.sleep(seconds)
            taken.extend(rows)

    monkeypatch.setitem(TRACKERS, "slow", Slow)
    times = []
    train(run_dir=tmp_path / "run", log=("slow",), on_rows=lambda _: times.append(time.time()))
    assert len(taken) == len(whole.metrics) + len(whole.evaluations) + 2
    # Pieces of this training end within milliseconds of each other.
    assert np.median(np.diff(times[:-1])) < seconds / 2


SPACE = {"learning_rate": [1e-3, 1e-2]}


@pytest.mark.parametrize("kind", ["sweep", "search"])
def test_each_member_of_a_sweep_is_a_run_of_its_own(kind, tmp_path):
    common = {"run_dir": tmp_path / "x", "log": ("tensorboard",), "progress": False}
    if kind == "sweep":
        result = ppo_jax.sweep(CONFIG, SPACE, seeds=SEEDS, num_rows=5, eval_episodes=4, **common)
    else:
        result = ppo_jax.search(
            CONFIG, SPACE, method="pbt", num_members=4, num_rounds=5, eval_episodes=4, **common
        )
    members = result.members.set_index("member")
    folders = {path.name: path for path in (tmp_path / "x" / "tensorboard").iterdir()}
    assert folders.keys() == {
        f"member_{number}_seed_{seed}" for number, seed in members["seed"].items()
    }
    for number, member in members.iterrows():
        folder = folders[f"member_{number}_seed_{member['seed']}"]
        points = [
            (event.step, value.tag, value.simple_value)
            for event in tensorboard_events(folder)
            for value in event.summary.value
            if value.HasField("simple_value")
        ]
        curve = result.curves[result.curves["member"] == number]
        found = [(step, x) for step, tag, x in points if tag == "train/entropy"]
        np.testing.assert_allclose(found, curve[["timesteps", "train/entropy"]], rtol=1e-6)
        *_, last = [(step, x) for step, tag, x in points if tag == "eval/return"]
        np.testing.assert_allclose(last, (member["timesteps"], member["eval/return"]), rtol=1e-6)
        times = [x for _, tag, x in points if tag == "time/seconds"]
        # The final evaluation has the time of the last update.
        assert times == sorted(times)
        np.testing.assert_allclose(times[-2:], result.run_seconds, rtol=1e-6)
        text = b"".join(path.read_bytes() for path in folder.iterdir())
        assert str(member["learning_rate"]).encode() in text


def test_evaluations_have_a_time_of_their_own(logged):
    run, _ = logged
    assert run.evaluation_seconds > 0
    without = train(eval_every=None)
    # The final evaluation is timed as well.
    assert without.evaluation_seconds > 0


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("tensorboard", "tensorboardX"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
        ("trackio", "trackio"),
    ],
)
def test_a_package_that_is_missing_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*pip install 'ppo-jax\[{name}\]'"):
        make_sinks((name,), run_dir="x")
