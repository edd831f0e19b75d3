"""Suites of environments, each in its adapter; those that are not installed are skipped.

`make test-suites` installs all of them and runs these tests.
"""

import importlib
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, envs, evaluate, make_trainer, presets
from ppo_jax.envs.suites import SUITES
from ppo_jax.published import BRAX_ARGUMENTS
from ppo_jax.testing import check_env
from tests.conftest import optimized_jit

EXAMPLES = {
    "brax": "inverted_pendulum",
    "craftax": "Craftax-Classic-Symbolic-v1",
    "jaxmarl": "MPE_simple_spread_v3",
    "jaxtari": "pong",
    "jumanji": "Snake-v1",
    "navix": "Navix-DoorKey-Random-5x5-v0",
    "octax": "brix",
    "pgx": "tic_tac_toe",
    "playground": "CartpoleBalance",
    "xminigrid": "MiniGrid-DoorKey-5x5",
}
"""A task of each suite."""


@pytest.fixture(autouse=True)
def _their_own_habits():
    """Suites add arrays of different ranks, and warn of what others deprecate."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def _blank_pictures(tmp_path, monkeypatch):
    """The pictures of jaxtari, which it downloads, as white squares: games do not look at them."""
    if not SUITES["jaxtari"].is_installed:
        return
    from jaxtari.rendering.jax_rendering_utils import JaxRenderingUtils

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "jaxtari").mkdir()
    (tmp_path / "jaxtari" / ".ownership_confirmed").touch()
    (tmp_path / "jaxtari" / ".version").write_text("1")
    square = jnp.full((4, 4, 4), 255, jnp.uint8)
    monkeypatch.setattr(JaxRenderingUtils, "loadFrame", lambda *_, **options: square)
    monkeypatch.setattr(
        JaxRenderingUtils,
        "_load_and_pad_digits_from_paths",
        lambda self, paths, num_chars=10: jnp.stack([square] * len(paths)),
    )


pytestmark = pytest.mark.filterwarnings("ignore")


def needs(suite):
    return pytest.mark.skipif(
        not SUITES[suite].is_installed, reason=f"pip install 'ppo-jax[{suite}]'"
    )


def each(names):
    return [pytest.param(name, marks=needs(name)) for name in names]


def test_every_suite_has_an_example():
    assert EXAMPLES.keys() == SUITES.keys()
    for suite, task in EXAMPLES.items():
        assert task in SUITES[suite].tasks


@pytest.mark.parametrize("suite", each(EXAMPLES))
def test_a_task_keeps_the_rules(suite):
    check_env(f"{suite}:{EXAMPLES[suite]}", num_envs=4, num_steps=128)


@pytest.mark.parametrize("suite", each(EXAMPLES))
def test_a_task_is_trained(suite):
    name = f"{suite}:{EXAMPLES[suite]}"
    num_envs = 4 * envs.make(name).num_agents
    config = Config(env=name, num_envs=num_envs, num_steps=8, hidden_sizes=(8,))
    config = config.replace(total_timesteps=2 * config.batch_size)
    _, metrics = jax.jit(make_trainer(config).run)(jax.random.key(0))
    assert np.isfinite(metrics["train/policy_loss"]).all()


@pytest.mark.parametrize("suite", each(sorted(SUITES)))
def test_a_suite_that_cannot_be_imported_is_said_so(suite, monkeypatch):
    module = SUITES[suite].module
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs .*pip install 'ppo-jax\[{suite}\]'"):
        envs.make(f"{suite}:{EXAMPLES[suite]}")


def registry_of(suite):
    """Names of the suite's own tasks, from the suite."""
    if suite == "brax":
        return importlib.import_module("brax.envs")._envs
    if suite == "jaxtari":
        return importlib.import_module("jaxtari.core").GAME_MODULES
    if suite == "jumanji":
        return importlib.import_module("jumanji").registered_environments()
    if suite == "navix":
        return importlib.import_module("navix").registry()
    if suite == "pgx":
        return importlib.import_module("pgx").available_envs()
    if suite == "playground":
        return importlib.import_module("mujoco_playground").registry.ALL_ENVS
    return importlib.import_module("xminigrid").registered_environments()


@pytest.mark.parametrize(
    "suite", each(["brax", "jaxtari", "jumanji", "navix", "pgx", "playground", "xminigrid"])
)
def test_the_list_of_tasks_is_the_suites(suite):
    assert set(SUITES[suite].tasks) == set(registry_of(suite))


DOWNLOADED = ("jumanji:Sokoban-v0", "xminigrid:XLand")
"""Beginnings of the names of tasks that need files from the internet."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite", each(["craftax", "jaxmarl", "jumanji", "navix", "octax", "pgx", "xminigrid"])
)
def test_every_task_is_as_it_is_described(suite):
    for task in SUITES[suite].tasks:
        name = f"{suite}:{task}"
        if not name.startswith(DOWNLOADED):
            envs.checks.check_env(envs.make(name))


@pytest.mark.parametrize("suite", each(["craftax", "navix", "octax", "xminigrid"]))
def test_an_episode_is_drawn(suite):
    env = envs.make(f"{suite}:{EXAMPLES[suite]}")
    _, state = jax.jit(env.reset)(jax.random.key(0), env.params)
    states = [state]
    for i in range(6):
        step = jax.jit(env.step)(jax.random.key(i), state, jnp.int32(i % 3), env.params)
        state = step.state
        states.append(state)
    frames = list(env.renderer.frames(states, env.params))
    assert len(frames) == len(states)
    assert {(x.shape, x.dtype) for x in frames} == {(frames[0].shape, np.dtype("uint8"))}
    assert frames[0].ndim == 3
    assert frames[0].shape[2] == 3
    assert len(np.unique(frames[0].reshape(-1, 3), axis=0)) > 1
    assert any(not np.array_equal(frames[0], x) for x in frames[1:])


@needs("craftax")
def test_craftax_is_cut_by_its_limit_and_ended_by_death():
    env = envs.make("craftax:Craftax-Classic-Symbolic-v1")
    params = env.params.replace(max_timesteps=2)
    assert env.longest_episode(params) == 2
    step = jax.jit(env.step)
    _, state = jax.jit(env.reset)(jax.random.key(0), params)
    first = step(jax.random.key(1), state, jnp.int32(0), params)
    second = step(jax.random.key(2), first.state, jnp.int32(0), params)
    assert [bool(x) for x in (first.terminated, first.truncated)] == [False, False]
    assert [bool(x) for x in (second.terminated, second.truncated)] == [False, True]
    dead = step(jax.random.key(1), state.replace(player_health=0), jnp.int32(0), params)
    assert [bool(x) for x in (dead.terminated, dead.truncated)] == [True, False]
    # No reset: the observation is that of the last state.
    assert second.state.timestep == 2


def path_to_goal(env, key, params, action_of, limit=100):
    """Plays a policy of states in one environment; returns the steps."""
    _, state = jax.jit(env.reset)(key, params)
    step, steps = jax.jit(env.step), []
    for i in range(limit):
        steps.append(step(jax.random.fold_in(key, i), state, action_of(i), params))
        state = steps[-1].state
        if steps[-1].terminated or steps[-1].truncated:
            break
    return steps


# The way from the upper left to the lower right corner of an empty room of 3 x 3.
FORWARD, RIGHT = 0, 1


@needs("xminigrid")
def test_xminigrid_ends_at_the_goal_and_is_cut_by_its_limit():
    env = envs.make("xminigrid:MiniGrid-Empty-5x5")
    key = jax.random.key(0)
    # Whatever the direction at the start, one of four turns leads there in six steps.
    way = [FORWARD, FORWARD, RIGHT, FORWARD, FORWARD]
    ways = [
        path_to_goal(env, key, env.params, ([RIGHT] * n + way).__getitem__, limit=n + 5)
        for n in range(4)
    ]
    (steps,) = [steps for steps in ways if steps[-1].terminated]
    assert not steps[-1].truncated
    np.testing.assert_allclose(steps[-1].reward, 1 - 0.9 * len(steps) / 100, rtol=1e-6)
    # Tiles and colours of the whole view, as one-hot pairs.
    assert (steps[-1].obs.sum(axis=-1) == 2).all()
    short = env.params.replace(max_steps_in_episode=3)
    turning = path_to_goal(env, key, short, lambda i: RIGHT)
    assert len(turning) == 3
    assert turning[-1].truncated
    assert not turning[-1].terminated


@needs("xminigrid")
def test_tasks_of_xland_need_rules():
    with pytest.raises(ConfigError, match="tasks of XLand, and no others, need a benchmark"):
        envs.make("xminigrid:XLand-MiniGrid-R1-9x9")
    with pytest.raises(ConfigError, match="unknown benchmark 'trivial-21'.*trivial-21k"):
        envs.make("xminigrid:XLand-MiniGrid-R1-9x9", benchmark="trivial-21")


@needs("xminigrid")
def test_each_episode_of_xland_draws_rules_of_its_benchmark(tmp_path):
    from xminigrid.benchmarks import save_bz2_pickle
    from xminigrid.core.constants import TILES_REGISTRY, Colors, Tiles
    from xminigrid.core.goals import AgentHoldGoal
    from xminigrid.core.rules import EmptyRule

    balls = [TILES_REGISTRY[Tiles.BALL, color] for color in (Colors.RED, Colors.BLUE)]
    rulesets = {
        "goals": jnp.stack([AgentHoldGoal(tile=ball).encode() for ball in balls]),
        "rules": jnp.stack([EmptyRule().encode()[None]] * 2),
        "init_tiles": jnp.stack([ball[None] for ball in balls]),
        "num_rules": jnp.zeros(2, jnp.int32),
    }
    path = str(tmp_path / "rules")
    save_bz2_pickle(rulesets, path)
    env = envs.make("xminigrid:XLand-MiniGrid-R1-9x9", benchmark=path)
    reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
    _, state = reset(jax.random.split(jax.random.key(0), 16), env.params)
    goals = {tuple(goal) for goal in np.asarray(state.state.goal_encoding)}
    assert goals == {tuple(goal) for goal in np.asarray(rulesets["goals"])}
    check_env(env, num_envs=4, num_steps=64)


@needs("navix")
def test_navix_ends_at_the_goal_and_is_cut_by_its_limit():
    import navix

    env = envs.make("navix:Navix-Empty-5x5-v0")
    names = [action.__name__ for action in navix.actions.DEFAULT_ACTION_SET]
    forward, right = names.index("forward"), names.index("rotate_cw")
    way = [forward, forward, right, forward, forward]
    steps = path_to_goal(env, jax.random.key(0), env.params, lambda i: way[i], limit=5)
    assert len(steps) == 5
    assert steps[-1].terminated
    assert not steps[-1].truncated
    assert steps[-1].reward == 1.0
    assert (steps[-1].obs.sum(axis=-1) == 3).all()
    short = env.params.replace(max_steps_in_episode=3)
    turning = path_to_goal(env, jax.random.key(0), short, lambda i: right)
    assert len(turning) == 3
    assert turning[-1].truncated
    assert not turning[-1].terminated
    # The state of a locked door is 254, which is not a channel of its own.
    locked = envs.make("navix:Navix-KeyCorridorS3R1-v0")
    obs, _ = locked.reset(jax.random.key(0), locked.params)
    assert (obs.sum(axis=-1) == 3).all()
    with pytest.raises(ConfigError, match="unknown observation of navix 'symbolik'.*symbolic"):
        envs.make("navix:Navix-Empty-5x5-v0", observation="symbolik")


@needs("jumanji")
@pytest.mark.parametrize("task", ["Snake-v1", "Maze-v0", "Tetris-v0", "Connector-v3"])
def test_steps_are_those_of_jumanji(task):
    import jumanji

    theirs, env = jumanji.make(task), envs.make(f"jumanji:{task}")
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    their_step = jax.jit(theirs.step)
    key = jax.random.key(3)
    _, state = reset(key, ())
    their_state, timestep = jax.jit(theirs.reset)(key)
    ends = Counter()
    for i in range(200):
        mask = np.asarray(timestep.observation.action_mask)
        if isinstance(env.action_space, envs.spaces.MultiDiscrete):
            action = their_action = mask.argmax(axis=-1).astype(np.int32)
        else:
            action = np.int32(np.flatnonzero(mask)[i % mask.sum()])
            their_action = np.array(np.unravel_index(action, mask.shape), np.int32).squeeze()
        ours = step(key, state, jnp.asarray(action), ())
        their_state, timestep = their_step(their_state, jnp.asarray(their_action))
        np.testing.assert_allclose(ours.reward, np.sum(timestep.reward), rtol=1e-6)
        np.testing.assert_array_equal(
            ours.obs["action_mask"], np.ravel(timestep.observation.action_mask)
        )
        is_terminal = bool(timestep.last()) and not np.any(timestep.discount)
        assert bool(ours.terminated) == is_terminal
        assert bool(ours.truncated) == (bool(timestep.last()) and not is_terminal)
        ends[is_terminal] += 1
        state = ours.state
        if timestep.last():
            break
    assert ends[False]
    assert timestep.last() or task == "Snake-v1"  # whose mask forbids to die


@needs("jumanji")
def test_integers_of_jumanji_are_categories_or_numbers():
    env = envs.make("jumanji:Tetris-v0")
    entries = dict(env.observation_space.spaces)
    assert entries["grid"].shape == (10, 10, 2)
    assert env.action_space.num_values == 40  # rotation and column, whose mask is joint
    obs, _ = env.reset(jax.random.key(0), ())
    assert (obs["grid"].sum(axis=-1) == 1).all()
    assert obs["step_count"] == 0
    snake = envs.make("jumanji:Snake-v1")
    obs, state = snake.reset(jax.random.key(0), ())
    step = snake.step(jax.random.key(0), state, jnp.argmax(obs["action_mask"]), ())
    np.testing.assert_allclose(step.obs["step_count"], 1 / 3999, rtol=1e-6)


@needs("octax")
def test_octax_pays_what_the_score_gains_and_is_cut_by_its_limit():
    env = envs.make("octax:brix")
    params = env.params.replace(max_steps_in_episode=40)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    (obs, state), (_, other) = (reset(jax.random.key(seed), params) for seed in (0, 1))
    assert obs.shape == (64, 32, 4)
    assert not np.array_equal(*map(jax.random.key_data, (state.rng, other.rng)))
    total = 0.0
    for i in range(40):
        result = step(jax.random.key(i), state, jnp.int32(i // 8 % 3), params)
        total += float(result.reward)
        state = result.state
    assert total == float(state.current_score)
    assert result.truncated


@needs("pgx")
@pytest.mark.parametrize("seed", [0, 1])
def test_random_tic_tac_toe_is_won_as_often_as_enumeration_says(seed):
    """The first player wins 58.5 % of all random games, the second 28.8 %, and 12.7 % are drawn."""
    env = envs.make("pgx:tic_tac_toe")
    count = 4_000

    def play(key):
        reset_key, key = jax.random.split(key)
        obs, state = env.reset(reset_key, ())
        moves_first = state.game._step_count == 0

        def move(carry, key):
            obs, state, total, over = carry
            action_key, step_key = jax.random.split(key)
            logits = jnp.where(obs["action_mask"], 0.0, -jnp.inf)
            result = env.step(step_key, state, jax.random.categorical(action_key, logits), ())
            total += jnp.where(over, 0.0, result.reward)
            over |= result.terminated
            return (result.obs, result.state, total, over), None

        carry = obs, state, jnp.float32(0), jnp.array(False)
        (_, _, total, over), _ = jax.lax.scan(move, carry, jax.random.split(key, 5))
        return moves_first, total, over

    first, total, over = jax.jit(jax.vmap(play))(jax.random.split(jax.random.key(seed), count))
    first, total = np.asarray(first), np.asarray(total)
    assert over.all()
    assert abs(first.mean() - 0.5) < 4 * 0.5 / count**0.5
    for own, theirs, games in ((0.5849, 0.2881, total[first]), (0.2881, 0.5849, total[~first])):
        for share, result in ((own, 1), (theirs, -1), (0.1270, 0)):
            bound = 4 * (share * (1 - share) / len(games)) ** 0.5
            assert abs((games == result).mean() - share) < bound


@needs("pgx")
def test_rewards_before_the_first_turn_are_paid_by_the_first_step():
    """Games of three may end before the agent's first turn."""
    env = envs.make("pgx:sparrow_mahjong")
    reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
    obs, state = reset(jax.random.split(jax.random.key(0), 1_000), ())
    over = np.asarray(state.game.terminated)
    assert over.any()
    assert np.abs(state.pending[over]).max() > 0
    assert not np.any(state.pending[~over])
    step = jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))
    action = jnp.argmax(obs["action_mask"], axis=-1)
    result = step(jax.random.split(jax.random.key(1), 1_000), state, action, ())
    np.testing.assert_allclose(result.reward[over], state.pending[over])
    assert result.terminated[over].all()
    assert not np.any(result.state.pending)


@needs("pgx")
def test_an_opponent_can_be_a_function_or_a_name():
    from ppo_jax.envs.suites import pgx

    seen = []

    def last(key, obs):
        seen.append(sorted(obs))
        return obs["action_mask"].shape[0] - 1 - jnp.argmax(obs["action_mask"][::-1])

    for opponent, squares in ((last, {8, 7}), ("first", {0, 1})):
        env = pgx.make("tic_tac_toe", opponent=opponent)
        starts = [env.reset(jax.random.key(seed), ())[0]["action_mask"] for seed in range(12)]
        taken = {tuple(np.flatnonzero(~np.asarray(mask))) for mask in starts}
        # Nothing where the agent moves first.
        assert taken == {(), (max(squares) if opponent is last else min(squares),)}
    assert seen[0] == ["action_mask", "observation"]
    with pytest.raises(ConfigError, match="unknown opponent 'rndom'. Did you mean random"):
        envs.make("pgx:tic_tac_toe", opponent="rndom")


@needs("jaxmarl")
@pytest.mark.parametrize("task", ["MPE_simple_tag_v3", "HeuristicEnemySMAX"])
def test_steps_are_those_of_jaxmarl(task):
    import jaxmarl

    theirs, env = jaxmarl.make(task), envs.make(f"jaxmarl:{task}")
    key = jax.random.key(0)
    obs, state = env.reset(key, env.params)
    their_obs, their_state = theirs.reset(key)
    rng = np.random.default_rng(0)
    for _ in range(26):
        if "action_mask" in obs:
            given = theirs.get_avail_actions(their_state)
            for j, agent in enumerate(theirs.agents):
                np.testing.assert_array_equal(obs["action_mask"][j], given[agent].astype(bool))
            action = np.array([rng.choice(np.flatnonzero(row)) for row in obs["action_mask"]])
        else:
            action = rng.integers(0, 5, len(theirs.agents))
        for j, agent in enumerate(theirs.agents):
            size = len(their_obs[agent])
            np.testing.assert_allclose(obs["observation"][j, :size], their_obs[agent], rtol=1e-5)
            assert not np.any(obs["observation"][j, size:])
        step = jax.jit(env.step)(key, state, jnp.asarray(action, jnp.int32), env.params)
        actions = {agent: jnp.int32(action[j]) for j, agent in enumerate(theirs.agents)}
        their_obs, their_state, rewards, done, _ = theirs.step_env(key, their_state, actions)
        np.testing.assert_allclose(
            step.reward, [rewards[agent] for agent in theirs.agents], rtol=1e-5, atol=1e-6
        )
        assert bool(step.terminated | step.truncated) == bool(done["__all__"])
        obs, state = step.obs, step.state
        if done["__all__"]:
            break
    if task == "MPE_simple_tag_v3":  # its limit ends it and nothing else
        assert done["__all__"]
        assert step.truncated
        assert not step.terminated


@needs("playground")
def test_settings_of_playground_are_used_or_refused():
    with pytest.raises(ConfigError, match="config of CartpoleBalance 'ctrl_dtt'.*mean ctrl_dt"):
        envs.make("playground:CartpoleBalance", ctrl_dtt=0.1)
    once, twice = (
        envs.make("playground:CartpoleBalance", action_repeat=times, episode_length=10)
        for times in (1, 2)
    )
    assert (once.longest_episode(once.params), twice.longest_episode(twice.params)) == (10, 5)
    _, state = jax.jit(once.reset)(jax.random.key(0), once.params)
    action, key = jnp.full(1, 0.5), jax.random.key(0)
    first = jax.jit(once.step)(key, state, action, once.params)
    second = jax.jit(once.step)(key, first.state, action, once.params)
    both = jax.jit(twice.step)(key, state, action, twice.params)
    np.testing.assert_allclose(both.obs, second.obs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.reward, first.reward + second.reward, rtol=1e-5)


@needs("playground")
def test_published_settings_of_playground_are_those_of_the_package():
    registry = importlib.import_module("mujoco_playground").registry
    params = importlib.import_module("mujoco_playground.config.dm_control_suite_params")
    names = {name for name in BRAX_ARGUMENTS if name.startswith("playground:")}
    tasks = set(registry.dm_control_suite.ALL_ENVS) - {"CartpoleBalance"}  # tuned here
    assert names == {f"playground:{task}" for task in tasks}
    for task in tasks:
        theirs = params.brax_ppo_config(task).to_dict()
        assert theirs["normalize_observations"]
        assert theirs.get("action_repeat", 1) == 1
        ours = BRAX_ARGUMENTS[f"playground:{task}"]
        assert {name: theirs[name] for name in ours} == ours


@needs("playground")
def test_playground_starts_anew_at_each_reset_and_is_cut_by_its_limit():
    env = envs.make("playground:CartpoleBalance")
    assert env.longest_episode(env.params) == 1000
    reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
    obs, _ = reset(jax.random.split(jax.random.key(0), 8), env.params)
    assert len(np.unique(obs, axis=0)) == 8
    params = env.params.replace(max_steps_in_episode=1)
    _, state = jax.jit(env.reset)(jax.random.key(0), params)
    step = jax.jit(env.step)(jax.random.key(0), state, jnp.zeros(1), params)
    assert step.truncated
    assert not step.terminated


@needs("jaxtari")
def test_jaxtari_shows_objects_within_bounds_and_pays_points():
    import jaxtari

    theirs, env = jaxtari.make("pong"), envs.make("jaxtari:pong")
    step = jax.jit(env.step)
    obs, state = jax.jit(env.reset)(jax.random.key(0), ())
    their_obs, their_state = theirs.reset(jax.random.key(0))
    reset, total = obs, 0.0
    for i in range(500):
        action = jnp.int32(0)
        result = step(jax.random.key(i), state, action, ())
        their_obs, their_state, reward, done, _ = theirs.step(their_state, action)
        assert result.reward == reward
        assert bool(result.terminated) == bool(done)
        assert not result.truncated
        assert result.obs.min() >= 0
        assert result.obs.max() <= 1
        total += float(result.reward)
        state = result.state
    assert total < 0  # nobody plays
    assert not np.array_equal(result.obs, reset)
    # In the order of the space: player, enemy, ball, each of eight attributes.
    np.testing.assert_allclose(result.obs[16], float(their_obs.ball.x) / 160, rtol=1e-6)


@needs("jaxtari")
def test_missing_pictures_of_jaxtari_are_said_so(tmp_path):
    (tmp_path / "jaxtari" / ".ownership_confirmed").unlink()
    with pytest.raises(ConfigError, match="install-sprites downloads them"):
        envs.make("jaxtari:pong")


@needs("pgx")
def test_the_example_of_the_documentation(tmp_path):
    from tests.test_readme import examples, outputs

    outputs(examples("docs/environments.md")[-1:], tmp_path)


BARS = {
    "craftax:Craftax-Classic-Symbolic-v1": 4.0,
    "jaxmarl:MPE_simple_spread_v3": -20.0,
    "jumanji:Snake-v1": 9.0,
    "navix:Navix-DoorKey-5x5-v0": 0.9,
    "navix:Navix-Empty-Random-6x6-v0": 0.9,
    "jaxtari:pong": 10.0,
    "octax:wipe_off": 30.0,
    "pgx:connect_four": 0.8,
    "pgx:tic_tac_toe": 0.7,
    "playground:CartpoleBalance": 800.0,
    "xminigrid:MiniGrid-DoorKey-5x5": 0.9,
    "xminigrid:MiniGrid-Empty-8x8": 0.9,
}
"""Returns of sampled actions. Before a training they are those of `benchmarks/suites.py`."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name.partition(":")[0])) for name in BARS]
)
def test_a_preset_learns_its_task(name):
    config, hparams = presets.preset(name)
    trainer = make_trainer(config)
    run = optimized_jit(jax.vmap(lambda key: trainer.policy(trainer.run(key, hparams)[0])))
    policies = run(jax.random.split(jax.random.key(0), 2))
    play = optimized_jit(
        lambda policy: evaluate(
            policy, trainer.env, trainer.env.params, jax.random.key(1), 16, greedy=False
        ).returns.mean()
    )
    returns = [float(play(jax.tree.map(lambda x, i=i: x[i], policies))) for i in range(2)]
    assert min(returns) > BARS[name], returns


def test_every_preset_of_a_suite_has_a_bar():
    assert set(BARS) == {name for name in presets.names() if ":" in name}
