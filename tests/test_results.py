"""Plots, pictures and pages of runs, and evaluations in Gymnasium."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import gymnasium
import imageio_ffmpeg
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image, ImageSequence

import ppo_jax
from ppo_jax import Config, ConfigError, cli, envs
from ppo_jax.envs.environment import Renderer
from ppo_jax.evaluation import Evaluation
from ppo_jax.results import gymnasium_client, page, render
from ppo_jax.results.curves import plot_runs, read_curves
from ppo_jax.runs.plots import plot_returns
from ppo_jax.runs.trained import evaluate_run, summarize

SEEDS = (3, 4, 5, 6)
CONFIG = Config(num_envs=4, num_steps=32, total_timesteps=128 * 12, hidden_sizes=(8,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of four seeds with evaluations, and a run of one seed without."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"eval_episodes": 4, "progress": False}
    several = ppo_jax.train(
        CONFIG, seed=SEEDS[0], num_seeds=4, run_dir=folder / "several", eval_every=4, **common
    )
    single = ppo_jax.train(CONFIG, run_dir=folder / "single", **common)
    return several, single


def middle_half(values):
    """The mean without the lowest and the highest quarter, of four or eight values."""
    values = np.sort(values)
    quarter = len(values) // 4
    return values[quarter : len(values) - quarter].mean()


def expected_line(metrics, name):
    rows = metrics.groupby("timesteps")[name].apply(lambda x: middle_half(x.dropna()))
    return rows.dropna()


def test_a_plot_has_steps_and_seconds_of_training_and_of_evaluations(runs):
    several, single = runs
    figure = plot_runs([read_curves(run.run_dir) for run in runs])
    by_steps, by_seconds, evaluated, evaluated_by_seconds = figure.axes
    for axes, name, frames in (
        (by_steps, "episode/return", [several.metrics, single.metrics]),
        (evaluated, "eval/return", [several.evaluations]),
    ):
        assert len(axes.lines) == len(frames)
        for line, frame in zip(axes.lines, frames, strict=True):
            expected = (
                expected_line(frame, name)
                if frame["seed"].nunique() > 1
                else frame.set_index("timesteps")[name].dropna()
            )
            np.testing.assert_array_equal(line.get_xdata(), expected.index)
            np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)
    for left, right, frame in (
        (by_steps, by_seconds, several.metrics),
        (evaluated, evaluated_by_seconds, several.evaluations),
    ):
        seconds = frame.groupby("timesteps")["time/seconds"].first()
        np.testing.assert_array_equal(left.lines[0].get_ydata(), right.lines[0].get_ydata())
        expected = seconds.loc[left.lines[0].get_xdata()]
        np.testing.assert_allclose(right.lines[0].get_xdata(), expected)
    # Several seeds have an interval around their line.
    assert len(by_steps.collections) == 1
    (band,) = by_steps.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() <= by_steps.lines[0].get_ydata().min()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["several (4 seeds)", "single"]


def test_a_plot_of_training_is_smoothed_and_says_what_it_shows(runs):
    several, single = runs
    figure = plot_runs([read_curves(single.run_dir)], smooth=3)
    line = figure.axes[0].lines[0]
    returns = single.metrics.set_index("timesteps")["episode/return"]
    expected = returns.rolling(3, min_periods=1).mean()
    expected = expected[np.isin(returns.index, line.get_xdata())]
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)
    assert figure.get_suptitle() == "CartPole-v1"
    assert figure.axes[0].get_xlim()[0] == 0
    title = plot_runs([read_curves(several.run_dir)]).get_suptitle()
    assert title.startswith("CartPole-v1 (line and band: interquartile mean")
    with pytest.raises(ConfigError, match="smooth must be a positive integer; got 0"):
        plot_runs([read_curves(single.run_dir)], smooth=0)


def test_run_plot_draws_the_same_line(runs):
    several, _ = runs
    *_, line = plot_returns(several.metrics).lines
    expected = expected_line(several.metrics, "episode/return")
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6)


def test_a_run_without_a_complete_episode_is_plotted():
    frame = pd.DataFrame({"timesteps": [1, 2], "seed": 0, "episode/return": np.nan})
    assert not plot_returns(frame).lines


def test_a_long_curve_is_averaged_over_windows():
    steps = np.arange(1000)
    frame = pd.DataFrame({"timesteps": steps, "seed": 0, "episode/return": steps.astype(float)})
    (line,) = plot_returns(frame).lines
    assert len(line.get_xdata()) == 250
    np.testing.assert_allclose(line.get_ydata()[:2], [1.5, 5.5])
    np.testing.assert_array_equal(line.get_xdata()[:2], [3, 7])


def test_the_command_plots_and_replaces_nothing(runs, tmp_path, capsys):
    several, single = runs
    output = tmp_path / "curves.svg"
    arguments = ["plot", str(several.run_dir), str(single.run_dir)]
    assert cli.main(arguments) == 2
    assert "needs a file" in capsys.readouterr().err
    assert cli.main([*arguments, "-o", str(output), "--metric", "train/entropy"]) == 0
    assert "<svg" in output.read_text()
    assert cli.main([*arguments, "-o", str(output)]) == 2
    assert "must be new" in capsys.readouterr().err
    assert cli.main([*arguments, "-o", str(output), "--overwrite"]) == 0
    assert cli.main([*arguments, "-o", str(tmp_path / "x.jpg")]) == 2
    assert "must end in .png or .svg" in capsys.readouterr().err
    assert cli.main([*arguments, "-o", str(output), "--overwrite", "--metric", "train/entrpy"]) == 2
    assert "train/entropy" in capsys.readouterr().err
    assert cli.main(["plot", str(single.run_dir), "--metric", "train/entropy"]) == 2
    assert cli.main(["plot", str(single.run_dir), "--overwrite"]) == 2
    assert cli.main(["plot", str(single.run_dir)]) == 0
    assert (single.run_dir / "curves.png").stat().st_size > 10_000


def test_a_summary_has_interval_and_quantiles():
    returns = np.array([[1.0, 2.0, 4.0, 8.0, 16.0], [3.0] * 5])
    evaluation = Evaluation(returns, np.ones((2, 5)), np.ones((2, 5), bool))
    first, second = summarize(evaluation, (7, 8), greedy=True)["seeds"]
    low, high = scipy.stats.ttest_1samp(returns[0], 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(first["eval/return_interval"], [low, high])
    assert second["eval/return_interval"] == [3.0, 3.0]
    assert first["eval/return_quantiles"]["0.25"] == 2.0
    assert first["eval/return_quantiles"]["0.5"] == 4.0
    assert (first["eval/return_min"], first["eval/return_max"]) == (1.0, 16.0)
    one = summarize(jax.tree.map(lambda x: x[:1, :1], evaluation), (7,), greedy=True)
    assert one["seeds"][0]["eval/return_interval"] == [None, None]


@pytest.mark.parametrize("greedy", [True, False])
def test_gymnasium_gives_the_returns_of_an_independent_loop(runs, greedy):
    _, single = runs
    result = gymnasium_client.evaluate_in_gymnasium(
        single.policy, "CartPole-v1", 3, seed=5, greedy=greedy
    )
    game = gymnasium.make("CartPole-v1")
    if greedy:
        for i in range(3):
            obs, _ = game.reset(seed=5 + i)
            done, total = False, 0.0
            while not done:
                obs, reward, terminated, truncated, _ = game.step(int(single.policy(obs)))
                total, done = total + reward, terminated or truncated
            assert (result.returns[i], result.lengths[i]) == (total, total)
    else:
        # A policy that is hardly trained samples either action, and falls at different times.
        assert len(set(result.returns)) > 1


def test_gymnasium_takes_a_memory_and_continuous_actions():
    config = Config(env="Pendulum-v1", memory="gru", memory_size=4, hidden_sizes=(4,))
    trainer = ppo_jax.make_trainer(config)
    policy = trainer.policy(trainer.init(jax.random.key(0)))
    result = gymnasium_client.evaluate_in_gymnasium(policy, "Pendulum-v1", 2)
    assert result.lengths.tolist() == [200, 200]
    game = gymnasium.make("Pendulum-v1")
    obs, _ = game.reset(seed=0)
    state, total = policy.initial_recurrent_state(), 0.0
    for _ in range(200):
        action, state = policy.act(obs, state)
        obs, reward, *_ = game.step(np.clip(action, -2.0, 2.0))
        total += float(reward)
    np.testing.assert_allclose(result.returns[0], total, rtol=1e-4)


def test_differences_from_gymnasium_are_found(monkeypatch):
    assert gymnasium_client.differences("CartPole-v1") == []
    # gymnax's continuous mountain car lacks the wall at the left.
    (wall,) = gymnasium_client.differences("MountainCarContinuous-v0")
    assert "the observation after" in wall
    assert "0. ] in Gymnasium" in wall
    original = envs.make("CartPole-v1")
    heavier = original._replace(
        params=original.params.replace(gravity=9.0, max_steps_in_episode=100)
    )
    monkeypatch.setattr(envs, "make", lambda name: heavier)
    first, second = gymnasium_client.differences("CartPole-v1")
    assert "observation after" in first
    assert second == "episodes have at most 100 steps in gymnax, 500 in Gymnasium"


def test_the_command_evaluates_in_gymnasium(runs, capsys):
    several, _ = runs
    arguments = ["eval", str(several.run_dir), "--episodes", "3", "--gymnasium"]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert output.count("3 greedy episodes") == output.count("3 sampled episodes") == len(SEEDS)
    assert "CartPole-v1 of gymnax and of Gymnasium agree" in output


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config(env="Catch-bsuite"), "needs an environment that it has as well, CartPole-v1"),
        (Config(wrappers={"time_limit": 9}), "has wrappers {'time_limit': 9}"),
        (Config(env_params={"gravity": 9.0}), "has env_params"),
    ],
)
def test_gymnasium_needs_the_original_environment(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        gymnasium_client.require_same_environment(config)


def test_evaluate_run_is_the_same_with_any_number_of_seeds(runs):
    several, single = runs
    assert len(evaluate_run(several.run_dir, num_episodes=2)["seeds"]) == len(SEEDS)
    assert len(evaluate_run(single.run_dir, num_episodes=2)["seeds"]) == 1


def frames_of(path, milliseconds=40):
    """Frames of a GIF, in which a frame that lasts longer stands for several."""
    frames = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            count = frame.info["duration"] // milliseconds
            frames += [np.asarray(frame.convert("RGB"))] * count
    return frames


def test_a_gif_shows_the_episode(runs, tmp_path):
    """The cart, which is black, is in each picture where it is in the state."""
    several, _ = runs
    returns = render.render_run(several.run_dir, tmp_path / "x.gif", num_episodes=2, run_seed=4)
    env = envs.make("CartPole-v1")
    policy = ppo_jax.load(several.run_dir, seed=4)
    keys = jax.random.split(jax.random.key(0), 2)
    episodes = render.play(policy, env, keys, max_steps=500)
    assert returns == [episode.rewards.sum() for episode in episodes]
    assert all(episode.is_complete for episode in episodes)
    frames = frames_of(tmp_path / "x.gif")
    # Every second step is drawn: the environment has 50 a second.
    positions = [float(state.x) for episode in episodes for state in episode.states][::2]
    assert len(frames) == len(positions)
    for frame, x in zip(frames, positions, strict=True):
        # Below the axle, where the pole hides nothing.
        _, columns = np.nonzero(frame[306:314].sum(axis=-1) < 60)
        np.testing.assert_allclose(
            columns.mean(), 300 + x * 600 / 4.8, atol=6
        )  # the pole hides a part


def test_an_mp4_has_all_frames(runs, tmp_path):
    _, single = runs
    (total,) = render.render_run(single.run_dir, tmp_path / "x.mp4", max_steps=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        count, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "x.mp4"))
    assert count == total + 1
    np.testing.assert_allclose(seconds, count / 50, atol=0.02)


def played(config, max_steps=4):
    trainer = ppo_jax.make_trainer(config)
    policy = trainer.policy(trainer.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), 1)
    (episode,) = render.play(policy, trainer.env, keys, max_steps=max_steps)
    return trainer.env, episode


@pytest.mark.parametrize(
    "config",
    [
        Config(env="Pendulum-v1", wrappers={"action_repeat": 2, "frame_stack": 2, "time_limit": 9}),
        Config(env="Breakout-MinAtar", wrappers={"sticky_actions": 0.2}),
        Config(env="CartPole-v1-positions", memory="gru"),
        Config(env="Catch-bsuite"),
    ],
    ids=lambda config: config.env,
)
def test_environments_are_drawn_inside_wrappers(config):
    env, episode = played(config)
    frames = list(render.draw(env, [episode]))
    assert len(frames) == len(episode.states) == len(episode.rewards) + 1
    assert {(frame.dtype.name, frame.shape) for frame in frames} == {("uint8", frames[0].shape)}
    assert frames[0].shape[2] == 3
    assert not np.array_equal(frames[0], frames[-1])


@pytest.fixture
def any_rank():
    with jax.numpy_rank_promotion("allow"):  # brax broadcasts
        yield


@pytest.mark.slow
def test_a_task_of_brax_is_a_page(tmp_path, any_rank):
    config = Config(env="brax:inverted_pendulum", env_kwargs={"backend": "spring"})
    small = config.replace(num_envs=2, num_steps=2, num_minibatches=1, total_timesteps=4)
    run = ppo_jax.train(small, run_dir=tmp_path / "run", eval_episodes=1, progress=False)
    render.render_run(run.run_dir, tmp_path / "x.html", max_steps=2)
    text = (tmp_path / "x.html").read_text()
    assert "<html" in text
    assert len(text) > 1000
    with pytest.raises(ConfigError, match=r"can be drawn as an \.html page"):
        render.render_run(run.run_dir, tmp_path / "x.gif")


def test_an_environment_of_ones_own_is_drawn():
    class Count(tuple):
        """A state: how often it was stepped."""

    jax.tree_util.register_pytree_node(Count, lambda x: (list(x), None), lambda _, x: Count(x))
    base = envs.make("CartPole-v1")

    def reset(key, params):
        obs, state = base.reset(key, params)
        return obs, (state, Count([jnp.zeros((), jnp.int32)]))

    def step(key, state, action, params):
        inner, (count,) = state
        result = base.step(key, inner, action, params)
        return result._replace(state=(result.state, Count([count + 1])))

    def frames(states, params):
        for (count,) in states:
            yield np.full((2, 3, 3), int(count), np.uint8)

    env = base._replace(reset=reset, step=step, renderer=Renderer(Count, frames))
    trainer = ppo_jax.make_trainer(Config())
    policy = trainer.policy(trainer.init(jax.random.key(0)))
    (episode,) = render.play(policy, env, jax.random.split(jax.random.key(1), 1), max_steps=3)
    assert [frame.max() for frame in render.draw(env, [episode])] == [0, 1, 2, 3]
    blind = env._replace(renderer=Renderer(dict, frames))
    with pytest.raises(ConfigError, match="state_type must be the type of the environment's"):
        render.play(policy, blind, jax.random.split(jax.random.key(1), 1), max_steps=3)


def test_mistakes_of_render_are_named(runs, tmp_path, capsys, monkeypatch):
    _, single = runs
    path = str(single.run_dir)
    assert cli.main(["render", path, "-o", str(tmp_path / "x.png")]) == 2
    assert "must end in .gif or .mp4" in capsys.readouterr().err
    assert cli.main(["render", path, "-o", str(tmp_path / "no" / "x.gif")]) == 2
    assert "folder that exists" in capsys.readouterr().err
    assert cli.main(["render", path, "-o", str(tmp_path / "x.html")]) == 2
    assert "can be drawn as a .gif or an .mp4" in capsys.readouterr().err
    assert cli.main(["render", path, "-o", str(tmp_path / "upper.GIF"), "--max-steps", "3"]) == 0
    assert (tmp_path / "upper.GIF").read_bytes().startswith(b"GIF")
    assert not {"SDL_VIDEODRIVER", "SDL_AUDIODRIVER"} & os.environ.keys()
    (tmp_path / "x.gif").write_text("mine")
    assert cli.main(["render", path, "-o", str(tmp_path / "x.gif")]) == 2
    assert (tmp_path / "x.gif").read_text() == "mine"
    with pytest.raises(ConfigError, match="DeepSea-bsuite has none"):
        played(Config(env="DeepSea-bsuite"))
    assert cli.main(["render", path, "-o", str(tmp_path / "x.gif"), "--overwrite"]) == 0
    assert len(frames_of(tmp_path / "x.gif")) > 2
    assert "returns" in capsys.readouterr().out


def test_an_episode_that_is_cut_is_told(tmp_path, monkeypatch):
    endless = envs.make("CartPole-v1")
    endless = endless._replace(longest_episode=lambda params: None)
    monkeypatch.setattr(render, "_limit", lambda env: 3)
    policy = ppo_jax.make_trainer(Config()).policy
    state = ppo_jax.make_trainer(Config()).init(jax.random.key(0))
    monkeypatch.setattr(render, "_load", lambda *_, **__: (endless, policy(state)))
    with pytest.warns(RuntimeWarning, match="cut after 3 steps, and so is its return"):
        assert render.render_run("unused", tmp_path / "x.gif") == [3.0]


def test_evaluation_json_has_the_statistics(runs):
    _, single = runs
    record = json.loads((single.run_dir / "evaluation.json").read_text())
    (seed,) = record["seeds"]
    assert seed["eval/return_quantiles"].keys() == {"0.05", "0.25", "0.5", "0.75", "0.95"}


def test_a_page_has_everything_and_needs_nothing(runs, tmp_path):
    several, _ = runs
    path = page.write_page(several.run_dir)
    text = path.read_text()
    assert path == several.run_dir / "report.html"
    config = several.run_dir / "config.json"
    versions = json.loads(config.read_text())["made_with"]["versions"]
    for expected in (
        "CartPole-v1, ppo",
        f"{several.timesteps:,}",
        "4 greedy episodes of each seed",
        "95 % interval of the mean",
        "seconds of training",
        r"train\u002fentropy",  # as plotly escapes it
        "data:image/gif;base64,",
        "<td>num_steps</td><td>32</td>",
        "<td>learning_rate</td>",
        f"<td>jax</td><td>{versions['jax']}</td>",
    ):
        assert expected in text, expected
    # Changed settings are marked, and others are not.
    assert "<tr class=changed><td>num_envs</td>" in text
    assert "<tr><td>activation</td>" in text
    assert "<tr><td>gae_lambda</td>" in text
    # Nothing is loaded from elsewhere: plotly's code is in the page.
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="http', text)
    with pytest.raises(ConfigError, match="must be new"):
        page.write_page(several.run_dir, path)
    record = json.loads(config.read_text())
    record["hparams"]["gae_lambda"] = 0.5
    config.write_text(json.dumps(record))
    try:
        assert (
            "<tr class=changed><td>gae_lambda</td>" in page.write_page(several.run_dir).read_text()
        )
    finally:
        record["hparams"]["gae_lambda"] = 0.95
        config.write_text(json.dumps(record))
    assert page.write_page(several.run_dir, tmp_path / "x.html").stat().st_size > 4_000_000


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_page(runs):
    several, _ = runs
    path = page.write_page(several.run_dir)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=3000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    # Two figures of returns, eleven of metrics: plotly drew a line in each.
    figures = done.stdout.count('class="main-svg"') // 3
    lines = len(re.findall(r'class="js-line"', done.stdout))
    metrics = [name for name in several.metrics if name.startswith("train/")]
    assert figures == 2 + len(metrics) + 2
    assert lines >= figures


def test_a_new_run_keeps_nothing_of_the_old_one(tmp_path):
    """The plots, the page and the exports of a run that is replaced are not of the new one."""
    config = CONFIG.replace(total_timesteps=128)
    common = {"run_dir": tmp_path / "run", "eval_episodes": 1, "progress": False}
    ppo_jax.train(config, **common)
    for command in (["plot"], ["report", "--html"], ["export", "--format", "numpy"]):
        assert cli.main([command[0], str(tmp_path / "run"), *command[1:]]) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"curves.png", "report.html", "export", "notes.txt"} <= made
    ppo_jax.train(config, **common, overwrite=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert made - left == {"curves.png", "curves.svg", "report.html", "export"}


def test_a_page_of_a_run_that_cannot_be_drawn_or_is_not_finished(tmp_path):
    config = Config(env="DeepSea-bsuite", num_envs=4, num_steps=32, total_timesteps=256)
    run = ppo_jax.train(config, run_dir=tmp_path / "run", eval_episodes=2, progress=False)
    (run.run_dir / "evaluation.json").unlink()
    text = page.write_page(run.run_dir).read_text()
    assert "DeepSea-bsuite has none" in text
    assert "has not been evaluated yet" in text


def test_the_command_makes_a_page(runs, capsys, monkeypatch):
    _, single = runs
    assert cli.main(["report", str(single.run_dir), "--html"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert cli.main(["report", str(single.run_dir)]) == 2
    assert "add --html" in capsys.readouterr().err
    assert cli.main(["report", str(single.run_dir), "-o", "x.html"]) == 2
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert cli.main(["report", str(single.run_dir), "--html"]) == 2
    assert "pip install 'ppo-jax[html]'" in capsys.readouterr().err
