"""The contracts of `Trainer`, for every algorithm."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax import Config, HParams, make_train, make_trainer
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.defaults import GAINS
from ppo_jax.resolve import complete_hparams
from ppo_jax.stages.collect import _evaluated_together, _values
from ppo_jax.stages.optimizers import SCHEDULES, clip_actor_and_critic, make_optimizer
from ppo_jax.stages.rollout import rollout
from ppo_jax.types import Shard, Trajectory
from tests.conftest import exact_jit, optimized_jit

UPDATES = 6


def small(algorithm, **changes):
    used = ALGORITHMS[algorithm].settings if algorithm in ALGORITHMS else {}
    fields = {
        "algorithm": algorithm,
        "num_envs": 4,
        "num_steps": 16,
        "env_params": {"max_steps_in_episode": 16} if "reinforce" in algorithm else {},
        **{name: 2 for name in ("num_epochs", "num_minibatches") if name in used},
        "hidden_sizes": (16,),
        "total_timesteps": UPDATES * 64,
    }
    return Config(**{**fields, **changes})


@functools.cache  # pytest-xdist tears down a module's parametrised fixtures between tests
def case_of(algorithm):
    return Case(algorithm)


class Case:
    """One algorithm with its compiled functions, shared between tests."""

    def __init__(self, algorithm):
        self.algorithm = algorithm
        self.config = small(algorithm)
        self.trainer = make_trainer(self.config)
        self.hparams = jax.tree.map(jnp.float32, complete_hparams(None, self.config))
        self.traced = collections.Counter()
        self.init = self.jit(self.trainer.init)
        self.step = self.jit(self.trainer.step)
        self.run = self.jit(self.trainer.run)
        self.run_lanes = exact_jit(jax.vmap(self.trainer.run))

    def jit(self, function):
        """`exact_jit` that counts how often the function is traced."""

        def traced(*args):
            self.traced[function.__name__] += 1
            return function(*args)

        return exact_jit(traced)

    def lanes(self, gammas):
        """Hyperparameters that are the same in every lane but for gamma."""
        many = jax.tree.map(lambda x: jnp.full(len(gammas), x), self.hparams)
        return many.replace(gamma=jnp.array(gammas, jnp.float32))


def of_vector(vector):
    """Takes the place of a function that makes a tree of a vector of parameters."""
    raise AssertionError("optimisers of the package work on vectors")


RULES = ("reinforce_baseline", "trpo", "ppo")  # one row for each update rule


# One worker has all tests of an algorithm, and so compiles its functions once.
GROUPS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ALGORITHMS]


@pytest.fixture(params=GROUPS)
def case(request):
    return case_of(request.param)


def lane(tree, i):
    """One lane of a vmapped result, in NumPy: JAX would compile an index for every shape."""
    return jax.tree.map(lambda x: to_numpy(x)[i], tree)


def to_numpy(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(to_numpy(x), to_numpy(y))


def test_metrics_are_scalars_of_finite_numbers(case):
    _, metrics = case.run(jax.random.key(0), case.hparams)
    for name, value in metrics.items():
        assert value.shape == (UPDATES,), name
        if not name.startswith("episode/"):
            assert jnp.isfinite(value).all(), name


def test_vmapped_lanes_equal_a_loop_of_single_runs(case):
    """Lanes differ in the seed or in a hyperparameter; each is the run that is made alone."""
    keys = jax.random.split(jax.random.key(0), 2)[jnp.array([0, 1, 1])]
    hparams = case.lanes([0.9, 0.9, 0.5])
    states, _ = case.run_lanes(keys, hparams)
    lanes = [jax.tree.leaves(lane(states.learner, i)) for i in range(3)]
    for i, ours in enumerate(lanes):
        alone, _ = case.run(keys[i], lane(hparams, i))
        for x, y in zip(ours, jax.tree.leaves(alone.learner), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=5e-4)
    for i in (0, 2):  # neither the seed nor the hyperparameter is ignored
        pairs = zip(lanes[1], lanes[i], strict=True)
        assert any(not np.allclose(x, y, atol=1e-3) for x, y in pairs)


def test_changing_one_lane_changes_no_other(case):
    keys, hparams = jax.random.split(jax.random.key(0), 3), case.lanes([0.9, 0.9, 0.9])
    before = case.run_lanes(keys, hparams)
    after = case.run_lanes(keys.at[1].set(jax.random.key(99)), hparams)
    for i in (0, 2):
        assert_same_bits(lane(before, i), lane(after, i))
    with pytest.raises(AssertionError):
        assert_same_bits(lane(before[0].learner, 1), lane(after[0].learner, 1))


def test_run_equals_single_steps_bit_for_bit(case):
    whole, metrics = case.run(jax.random.key(0), case.hparams)
    state = case.init(jax.random.key(0), case.hparams)
    rows = []
    for _ in range(UPDATES):
        state, row = case.step(state, case.hparams)
        rows.append(row)
    assert_same_bits(whole, state)
    assert_same_bits(metrics, jax.tree.map(lambda *x: np.stack(x), *rows))


def test_new_keys_and_hyperparameters_do_not_recompile(case):
    """Nothing is traced again, neither for new values nor for the state that a step returns."""
    state = case.init(jax.random.key(0), case.hparams)
    for seed in range(3):
        hparams = case.hparams.replace(gamma=jnp.float32(0.2 * seed))
        case.run(jax.random.key(seed), hparams)
        state, _ = case.step(state, hparams)
    assert case.traced == {"init": 1, "step": 1, "run": 1}


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(name, marks=() if name == "ppo" else pytest.mark.slow) for name in RULES],
)
def test_defaults_values_given_and_steps_are_the_same_in_every_bit(algorithm):
    """With all optimisations: constants that the compiler could fold would round otherwise."""
    trainer = make_trainer(small(algorithm))
    hparams = jax.tree.map(jnp.float32, complete_hparams(None, small(algorithm)))
    run, step = optimized_jit(trainer.run), optimized_jit(trainer.step)
    whole = run(jax.random.key(0))
    assert_same_bits(whole, run(jax.random.key(0), hparams))
    state, rows = optimized_jit(trainer.init)(jax.random.key(0)), []
    for _ in range(UPDATES):
        state, row = step(state)
        rows.append(row)
    assert_same_bits(whole, (state, jax.tree.map(lambda *x: np.stack(x), *rows)))


@pytest.mark.parametrize("algorithm", RULES)
def test_memory_does_not_grow_with_total_timesteps(algorithm):
    """Beyond the metrics' own scalars."""

    def temporaries_and_outputs(updates):
        config = small(algorithm, total_timesteps=updates * 64)
        lowered = jax.jit(make_train(config)).lower(jax.random.key(0))
        analysis = lowered.compile().memory_analysis()
        num_metrics = len(jax.tree.leaves(lowered.out_info[1]))
        return analysis.temp_size_in_bytes, analysis.output_size_in_bytes, num_metrics

    short, long = temporaries_and_outputs(10), temporaries_and_outputs(10_000)
    scalars = 4 * long[2] * (10_000 - 10)
    assert long[1] - short[1] == scalars
    assert long[0] - short[0] <= scalars


def test_legacy_keys_work_too():
    jax.eval_shape(make_train(small("ppo")), jax.random.PRNGKey(0))


def test_the_kl_penaltys_weight_and_its_target_are_a_vmap_away():
    """β is state, steered by each lane's own d_targ from each lane's own first value."""
    trainer = make_trainer(small("ppo_adaptive"))
    hparams = HParams(
        learning_rate=jnp.full(4, 1e-2),
        kl_coef=jnp.array([0.5, 0.5, 2.0, 2.0]),
        d_targ=jnp.array([1e-9, 1e9, 1e-9, 1e9]),
    )
    states, metrics = jax.jit(jax.vmap(trainer.run, in_axes=(None, 0)))(jax.random.key(0), hparams)
    up, down = 2.0 ** np.arange(UPDATES + 1), 0.5 ** np.arange(UPDATES + 1)
    expected = np.stack([0.5 * up, 0.5 * down, 2.0 * up, 2.0 * down])
    np.testing.assert_allclose(metrics["train/kl_coef"], expected[:, :-1])
    np.testing.assert_allclose(states.learner.rule_state.kl_coef, expected[:, -1])
    # A heavier penalty holds the policy closer.
    moved = metrics["train/update_kl"].sum(axis=1)
    assert moved[2] < moved[3]


@pytest.mark.parametrize("name", list(GAINS))
def test_gains_are_a_vmap_away_and_move_their_own_layers_alone(name):
    trainer = make_trainer(small("ppo"))
    gains = HParams(**{name: jnp.array([0.5, 1.0])})
    states = jax.jit(jax.vmap(trainer.init, in_axes=(None, 0)))(jax.random.key(0), gains)
    ratios = {
        jax.tree_util.keystr(path): np.asarray(kernel[1] / kernel[0])
        for path, kernel in jax.tree_util.tree_leaves_with_path(states.learner.params)
        if kernel.ndim == 3
    }
    part = {"hidden_gain": "torso", "actor_gain": "actor_out", "critic_gain": "critic_out"}[name]
    assert sum(part in layer for layer in ratios) == (2 if part == "torso" else 1)
    for layer, ratio in ratios.items():
        np.testing.assert_allclose(ratio, 2.0 if part in layer else 1.0, rtol=1e-6)


def test_the_policy_that_acts_is_the_policy_that_learns():
    """Log-probabilities of the rollout, recomputed for the first minibatch: the ratio is 1."""
    for env in ("CartPole-v1", "Pendulum-v1"):
        trainer = make_trainer(small("ppo", env=env, num_minibatches=1, num_epochs=1))
        state = jax.jit(trainer.init)(jax.random.key(0))
        _, metrics = jax.jit(trainer.step)(state)
        assert metrics["train/approx_kl"] == pytest.approx(0.0, abs=1e-10)
        assert metrics["train/clip_fraction"] == 0.0


def test_rollouts_go_on_where_the_last_one_stopped():
    trainer = make_trainer(small("ppo"))
    state = jax.jit(trainer.init)(jax.random.key(0))
    policy = trainer.policy(state)
    roll = functools.partial(rollout, trainer.env, state.env_params, policy, num_steps=50)
    after, trajectory, ended = jax.jit(roll)(state.rollout, jax.random.key(1))
    done = trajectory.terminated | trajectory.truncated
    # Within an episode the successor is the next observation; at its end it is not.
    np.testing.assert_array_equal(
        trajectory.final_obs[:-1][~done[:-1]], trajectory.obs[1:][~done[:-1]]
    )
    assert done.any()
    assert (trajectory.final_obs[:-1][done[:-1]] != trajectory.obs[1:][done[:-1]]).any()
    np.testing.assert_array_equal(after.obs[~done[-1]], trajectory.final_obs[-1][~done[-1]])
    # Statistics: every step belongs to an episode that ended or that is under way.
    assert ended.num_episodes == done.sum()
    assert ended.length_sum + after.episode_length.sum() == 50 * 4
    assert ended.return_sum + after.episode_return.sum() == pytest.approx(50 * 4)
    assert after.episode_length[done[-1]].sum() == 0


def test_env_params_are_a_vmap_away():
    trainer = make_trainer(small("ppo"))
    limits = jnp.array([5, 7])
    params = jax.tree.map(lambda x: jnp.full(2, x), trainer.env.params)
    params = params.replace(max_steps_in_episode=limits)
    _, metrics = jax.jit(jax.vmap(trainer.run, in_axes=(None, None, 0)))(
        jax.random.key(0), None, params
    )
    np.testing.assert_allclose(np.nanmax(metrics["episode/length"], axis=1), limits)


def test_env_params_of_the_config_are_used():
    trainer = make_trainer(small("ppo", env_params={"max_steps_in_episode": 5}))
    _, metrics = jax.jit(trainer.run)(jax.random.key(0))
    np.testing.assert_allclose(metrics["episode/length"][1:], 5.0)


def test_the_first_minibatch_is_within_every_target_kl():
    """Its KL is 0, but for the rounding of a Beta distribution."""
    config = Config(
        env="Pendulum-v1",
        action_distribution="beta",
        num_envs=8,
        num_steps=16,
        num_minibatches=2,
        total_timesteps=256,
    )
    _, metrics = jax.jit(make_trainer(config).run)(jax.random.key(0), HParams(target_kl=0.0))
    np.testing.assert_array_equal(metrics["train/gradient_steps"], 1)


def test_target_kl_stops_an_update_under_vmap():
    trainer = make_trainer(small("ppo", num_epochs=4, num_minibatches=4, lr_schedule="constant"))
    state = jax.jit(trainer.init)(jax.random.key(0))
    step = jax.jit(jax.vmap(trainer.step, in_axes=(None, 0)))
    limits = jnp.array([0.0, 0.01, jnp.inf])
    hparams = HParams(learning_rate=jnp.full(3, 0.02), target_kl=limits)
    states, metrics = step(state, hparams)
    steps = metrics["train/gradient_steps"]
    assert steps[2] == 16
    assert steps[0] < steps[1] < 16
    # An early stop leaves the state of the last step that was taken, optimiser included.
    unlimited, _ = step(state, hparams.replace(target_kl=None))
    for i, same in ((2, True), (1, False)):
        pairs = zip(
            jax.tree.leaves(states.learner), jax.tree.leaves(unlimited.learner), strict=True
        )
        assert all(np.allclose(x[i], y[i], atol=1e-6) for x, y in pairs) == same


def test_value_clipping_and_clipped_gradients_change_the_update():
    trainer = make_trainer(small("ppo"))
    state = jax.jit(trainer.init)(jax.random.key(0))
    step = jax.jit(trainer.step)

    def params_after(**hparams):
        learner = step(state, HParams(learning_rate=1e-2, **hparams))[0].learner
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(learner.params)])

    base = params_after()
    assert not np.allclose(params_after(value_clip_eps=1e-3), base)
    np.testing.assert_allclose(params_after(value_clip_eps=jnp.inf), base, atol=1e-6)
    assert not np.allclose(params_after(max_grad_norm=1e-6), base)
    assert not np.allclose(params_after(max_grad_value=1e-6), base)


@pytest.mark.parametrize("where", ["minibatch", "batch", "none"])
def test_advantages_are_standardised_where_the_config_says(where):
    """Scaling every reward changes a policy's loss only where nothing is standardised."""
    config = small("ppo", normalize_advantage=where, num_minibatches=1, num_epochs=1)
    trainer = make_trainer(config)
    state = jax.jit(trainer.init)(jax.random.key(0))
    _, metrics = jax.jit(trainer.step)(state, HParams(gae_lambda=1.0))
    # With ratio 1 the loss is minus the mean advantage: zero once standardised.
    is_zero = abs(float(metrics["train/policy_loss"])) < 1e-5
    assert is_zero == (where != "none")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.5 + 0.5 / np.sqrt(2), 0.5, 0.5 - 0.5 / np.sqrt(2)]),
    ],
)
def test_learning_rate_schedules(schedule, expected):
    config = small("ppo", lr_schedule=schedule, total_timesteps=4 * 64)
    _, metrics = jax.jit(make_train(config))(jax.random.key(0), HParams(learning_rate=0.5))
    np.testing.assert_allclose(metrics["train/learning_rate"], 0.5 * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_after_the_last_update_keep_the_last_learning_rate(schedule):
    """Unclipped, a linear schedule would turn negative and a cosine would rise again."""
    config = small("ppo", lr_schedule=schedule, total_timesteps=2 * 64)
    trainer = make_trainer(config)
    hparams = HParams(learning_rate=0.5)
    state = jax.jit(trainer.init)(jax.random.key(0), hparams)
    step = jax.jit(trainer.step)
    rates, params = [], []
    for _ in range(6):
        state, metrics = step(state, hparams)
        rates.append(float(metrics["train/learning_rate"]))
        params.append(state.learner.params)
    if schedule in ("linear", "cosine"):
        np.testing.assert_allclose(rates, [0.5, 0.25, 0.0, 0.0, 0.0, 0.0], atol=1e-7)
        assert_same_bits(params[2], params[5])
    else:
        assert min(rates) > 0.0


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "lion"])
def test_optimizers_by_name(name, separate):
    config = small("ppo", optimizer=name, separate_grad_norms=separate, total_timesteps=64)
    state, _ = jax.jit(make_train(config))(jax.random.key(0))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.learner.params))


def test_adams_eps_is_1e5_unless_given():
    gradient = {"w": jnp.array([3e-6, 1.0])}

    def first_step(tx):
        return tx.update(gradient, tx.init(gradient), gradient)[0]["w"]

    ours = make_optimizer(Config())(0.1, HParams(), of_vector)
    np.testing.assert_allclose(first_step(ours), first_step(optax.adam(0.1, eps=1e-5)), rtol=1e-6)
    given = make_optimizer(Config(optimizer_kwargs={"eps": 1e-8}))(0.1, HParams(), of_vector)
    np.testing.assert_allclose(first_step(given), first_step(optax.adam(0.1)), rtol=1e-6)


def test_rmsprop_starts_as_in_stable_baselines3():
    """Its RMSpropTFLike: a squared average that starts from 1, and eps inside of the root."""
    gradients = [jnp.array([0.3, -2.0]), jnp.array([0.1, 1.0])]
    tx = make_optimizer(Config(optimizer="rmsprop"))(0.1, HParams(), of_vector)
    state, average = tx.init(gradients[0]), np.ones(2)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, gradient)
        average = 0.99 * average + 0.01 * np.square(gradient)
        np.testing.assert_allclose(updates, -0.1 * gradient / np.sqrt(average + 1e-5), rtol=1e-5)


def test_a_gradient_s_norm_is_clipped_before_its_entries():
    gradient = jnp.array([30.0, -40.0])
    for config, hparams, expected in (
        (Config(), {"max_grad_norm": 0.5}, [0.3, -0.4]),
        (Config(), {"max_grad_value": 0.35}, [0.35, -0.35]),
        (Config(), {"max_grad_norm": 0.5, "max_grad_value": 0.35}, [0.3, -0.35]),
        (Config(separate_grad_norms=True), {"max_grad_norm": 0.5}, [30.0, -40.0]),
        (Config(separate_grad_norms=True), {"max_grad_norm": 0.5, "max_grad_value": 9}, [9, -9]),
    ):
        tx = make_optimizer(config.replace(optimizer="sgd"))(1.0, HParams(**hparams), of_vector)
        updates, _ = tx.update(gradient, tx.init(gradient), gradient)
        np.testing.assert_allclose(-updates, expected, rtol=1e-6)


def test_a_critic_s_gradient_fills_the_joint_norm_alone():
    gradient = {
        "params": {
            "actor_torso": {"w": jnp.array([0.6, 0.0])},
            "actor_out": {"w": jnp.array([0.0, 0.8])},
            "critic_torso": {"w": jnp.array([300.0, 400.0])},
        }
    }
    joint = make_optimizer(Config(optimizer="sgd"))(1.0, HParams(max_grad_norm=0.5), of_vector)
    updates, _ = joint.update(gradient, joint.init(gradient), gradient)
    for parts, norm in (
        (updates["params"], 0.001),
        (clip_actor_and_critic(gradient, 0.5)["params"], 0.5),
    ):
        actor = np.hypot(parts["actor_torso"]["w"], parts["actor_out"]["w"])
        assert np.linalg.norm(parts["critic_torso"]["w"]) == pytest.approx(0.5, rel=1e-4)
        assert np.linalg.norm(actor) == pytest.approx(norm, rel=1e-4)


def test_separate_norms_change_the_update_of_the_actor():
    """With SGD, whose step is the clipped gradient: the actor's is longer by itself."""
    moved = {}
    for separate in (False, True):
        config = small(
            "ppo",
            optimizer="sgd",
            separate_grad_norms=separate,
            num_epochs=1,
            num_minibatches=1,
            lr_schedule="constant",
        )
        trainer = make_trainer(config)
        # A large weight of the value loss: the critic's gradient fills any norm.
        hparams = HParams(learning_rate=1.0, max_grad_norm=0.5, vf_coef=1e4)
        state = jax.jit(trainer.init)(jax.random.key(0), hparams)
        after, _ = jax.jit(trainer.step)(state, hparams)
        step = jax.tree.map(jnp.subtract, after.learner.params, state.learner.params)["params"]
        for part in ("actor", "critic"):
            leaves = jax.tree.leaves({k: v for k, v in step.items() if k.startswith(part)})
            moved[part, separate] = np.linalg.norm(np.concatenate([x.ravel() for x in leaves]))
    assert moved["critic", True] == pytest.approx(0.5, rel=1e-3)
    assert moved["critic", False] == pytest.approx(0.5, rel=1e-3)
    assert moved["actor", True] > 10 * moved["actor", False]


def test_the_critic_evaluates_every_state_and_at_most_a_minibatch_together():
    config = small("ppo", num_minibatches=4)  # of 16 samples: 8 states and their successors
    evaluated = []

    class Sum:
        def value(self, obs):
            evaluated.append(obs.shape[0] * obs.shape[1])
            return obs.sum(-1)

    obs, final_obs = jax.random.normal(jax.random.key(0), (2, config.num_steps, config.num_envs, 3))
    unused = dict.fromkeys(("action", "action_params", "terminated", "truncated"))
    trajectory = Trajectory(obs=obs, final_obs=final_obs, reward=obs.sum(-1), **unused)
    num_states = _evaluated_together(config, Shard(config.num_envs))
    values = _values(Sum(), trajectory, num_states)
    np.testing.assert_allclose(values.value, obs.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(values.next_value, final_obs.sum(-1), rtol=1e-6)
    assert evaluated == [8, 8]
