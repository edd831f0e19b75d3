"""Every estimator's mean gradient is the exact one, found by enumerating all trajectories."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, envs, make_trainer
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import Box, Discrete
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import init_params, make_spec
from ppo_jax.resolve import complete_config, complete_hparams
from ppo_jax.stages.collect import collect
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.rollout import reset, rollout
from ppo_jax.types import Shard, Statistics, Values

STATES, ACTIONS, HORIZON = 4, 2, 3
_RNG = np.random.default_rng(0)
START = _RNG.dirichlet(np.ones(STATES))
TRANSITIONS = _RNG.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
REWARDS = _RNG.normal(size=(STATES, ACTIONS)) + 1.0
ENDS = 3  # entering this state ends the episode; so does the horizon, as a terminal state


def tabular_env():
    def observe(state, time):
        return jnp.concatenate([jax.nn.one_hot(state, STATES), jax.nn.one_hot(time, HORIZON + 1)])

    def draw(key, probabilities):
        return jax.random.categorical(key, jnp.log(jnp.asarray(probabilities, jnp.float32)))

    def env_reset(key, params):
        state = draw(key, START)
        return observe(state, 0), (state, jnp.int32(0))

    def env_step(key, env_state, action, params):
        state, time = env_state
        successor = draw(key, jnp.asarray(TRANSITIONS)[state, action])
        reward = jnp.asarray(REWARDS, jnp.float32)[state, action]
        terminated = (successor == ENDS) | (time + 1 >= HORIZON)
        obs = observe(successor, time + 1)
        return Step(obs, (successor, time + 1), reward, terminated, jnp.array(False))

    return Environment(
        "tabular", env_reset, env_step, (), Box((STATES + HORIZON + 1,)), Discrete(ACTIONS)
    )


def all_trajectories():
    """Every trajectory as rows `[K, HORIZON]`: states, actions, whether the step happened.

    One that ends by entering ENDS is listed once: what would follow is state 0 and action 0.
    """
    rows = []
    for states in itertools.product(range(STATES), repeat=HORIZON):
        for actions in itertools.product(range(ACTIONS), repeat=HORIZON):
            length = next((t for t in range(1, HORIZON) if states[t] == ENDS), HORIZON)
            if not any(states[length + 1 :]) and not any(actions[length:]):
                rows.append((states, actions, np.arange(HORIZON) < length))
    return (np.array(column) for column in zip(*rows, strict=True))


def exact_return(logits, gamma):
    """R̄ = Σ_τ p_θ(τ) R(τ), over every trajectory; `logits` is `[HORIZON, STATES, ACTIONS]`."""
    states, actions, happened = all_trajectories()
    moves = TRANSITIONS[states[:, :-1], actions[:, :-1], states[:, 1:]]
    chance = START[states[:, 0]] * np.where(happened[:, :-1], moves, 1.0).prod(axis=1)
    value = (gamma ** np.arange(HORIZON) * REWARDS[states, actions] * happened).sum(axis=1)
    log_policy = jax.nn.log_softmax(logits)[np.arange(HORIZON), states, actions]
    return jnp.sum(chance * value * jnp.exp(jnp.sum(log_policy * happened, axis=1)))


def test_the_probabilities_of_all_trajectories_add_up_to_one():
    states, actions, happened = all_trajectories()
    moves = TRANSITIONS[states[:, :-1], actions[:, :-1], states[:, 1:]]
    chance = START[states[:, 0]] * np.where(happened[:, :-1], moves, 1.0).prod(axis=1)
    assert np.sum(chance * ACTIONS ** -happened.sum(axis=1).astype(float)) == pytest.approx(1.0)


class Fixture:
    """A policy in the tabular world, and the gradient of an algorithm's loss on one batch."""

    def __init__(self, algorithm, num_envs=64, **changes):
        if "tabular" not in envs.names():
            envs.register("tabular", tabular_env)
        self.row = ALGORITHMS[algorithm]
        changes.setdefault("normalize_advantage", "none")
        config = Config(
            env="tabular",
            algorithm=algorithm,
            num_envs=num_envs,
            num_steps=HORIZON,
            hidden_sizes=(),
            total_timesteps=num_envs * HORIZON,
            **changes,
        )
        self.config = complete_config(config)
        self.env = envs.make("tabular")
        self.spec = make_spec(self.config, self.env, has_critic=self.row.has_critic)
        self.losses = Losses(
            self.config,
            self.spec,
            self.row.objective,
            Shard(num_envs),
            per_episode=self.row.whole_episodes,
        )
        obs = jnp.zeros((1, STATES + HORIZON + 1))
        params = init_params(self.spec, jax.random.key(0), obs)
        keys = jax.random.split(jax.random.key(1), 100)
        leaves, treedef = jax.tree.flatten(params)
        self.params = jax.tree.unflatten(
            treedef,
            [0.7 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=False)],
        )

    def hparams(self, **values):
        return complete_hparams(None, self.config).replace(**values)

    def batch(self, key, hparams):
        """One rollout of whole episodes, by the stage that the trainer uses."""
        reset_key, key = jax.random.split(key)
        start = reset(self.env, (), reset_key, num_envs=self.config.num_envs)
        policy = Policy(self.params, spec=self.spec)
        stats = Statistics()
        batch = collect(
            policy,
            start,
            stats,
            config=self.config,
            algorithm=self.row,
            env=self.env,
            env_params=(),
            hparams=hparams,
            key=key,
            shard=Shard(self.config.num_envs),
        ).batch
        # Only first episodes start from START; later ones in the rollout are cut by its end.
        mask = (jnp.cumsum(batch.done, axis=0) - batch.done) == 0
        return batch._replace(mask=mask if batch.mask is None else batch.mask)

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def gradients(self, keys, gamma):
        """Ascent direction of the actor on each batch, in units of ∇R̄, `[batches, P]`."""
        hparams = self.hparams(gamma=gamma, ent_coef=0.0)
        if hparams.gae_lambda is not None:
            hparams = hparams.replace(gae_lambda=1.0)

        def one(key):
            batch = self.batch(key, hparams)
            grads = jax.grad(self.losses.policy, has_aux=True)(self.params, batch, hparams)[0]
            # A mean over samples is a mean over episodes but for the number of samples.
            scale = 1.0 if self.row.whole_episodes else batch.mask.sum() / self.config.num_envs
            return -scale * grads["params"]["actor_out"]["kernel"].ravel()

        return jax.lax.map(one, keys, batch_size=50)

    def exact(self, gamma):
        """∇R̄ of the same parameters."""

        def exact_of(kernel):
            bias = self.params["params"]["actor_out"]["bias"]
            by_state, by_time = kernel[:STATES], kernel[STATES : STATES + HORIZON]
            logits = by_time[:, None, :] + by_state[None, :, :] + bias[None, None, :]
            return exact_return(logits, gamma)

        return np.asarray(jax.grad(exact_of)(self.params["params"]["actor_out"]["kernel"])).ravel()


BATCHES = 2000


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("algorithm", ["reinforce", "reinforce_to_go", "reinforce_baseline"])
def test_policy_gradients_are_unbiased_discounted_or_not(algorithm, gamma):
    check(Fixture(algorithm), gamma)


def test_a_loss_of_whole_episodes_is_the_mean_over_those_that_count():
    """Without a limit of steps, the end of the rollout can cut the first episode of a column."""
    fixture = Fixture("reinforce", num_envs=8)
    hparams = fixture.hparams(ent_coef=0.0)
    batch = fixture.batch(jax.random.key(3), hparams)
    batch = batch._replace(mask=batch.mask.at[:, ::2].set(False))
    loss, _ = fixture.losses.policy(fixture.params, batch, hparams)
    of_episodes = jnp.sum(batch.mask * batch.log_prob * batch.advantages, axis=0)
    np.testing.assert_allclose(loss, -np.sum(of_episodes) / 4, rtol=1e-6)
    # The samples of minibatches have no axis of time.
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    np.testing.assert_allclose(
        fixture.losses.policy(fixture.params, flat, hparams)[0], loss, rtol=1e-6
    )


@pytest.mark.parametrize(
    "algorithm", [name for name, row in ALGORITHMS.items() if not row.whole_episodes]
)
def test_at_the_old_policy_every_objective_has_the_exact_gradient(algorithm):
    check(Fixture(algorithm), 1.0)


def test_the_td_error_gives_the_exact_gradient_when_the_critic_is_exact():
    """With λ = 0 the advantage is unbiased only if V is right; so the critic is made right."""
    fixture = Fixture("actor_critic")
    hparams = fixture.hparams(gamma=1.0, ent_coef=0.0, gae_lambda=0.0)
    logits = fixture.params["params"]["actor_out"]
    kernel, bias = np.asarray(logits["kernel"]), np.asarray(logits["bias"])
    value = np.zeros((HORIZON + 1, STATES))
    for t in reversed(range(HORIZON)):
        table = kernel[:STATES] + kernel[STATES + t] + bias
        policy = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
        later = value[t + 1] * (np.arange(STATES) != ENDS)
        value[t] = (policy * (REWARDS + TRANSITIONS @ later)).sum(-1)
    table = jnp.asarray(value, jnp.float32)

    def exact_value(obs):
        state, time = jnp.argmax(obs[..., :STATES], -1), jnp.argmax(obs[..., STATES:], -1)
        return table[time, state]

    @jax.jit
    def gradient(key):
        reset_key, roll_key = jax.random.split(key)
        start = reset(fixture.env, (), reset_key, num_envs=64)
        acting = Policy(fixture.params, spec=fixture.spec)
        _, trajectory, _ = rollout(fixture.env, (), acting, start, roll_key, num_steps=HORIZON)
        values = Values(exact_value(trajectory.obs), exact_value(trajectory.final_obs))
        estimates = fixture.row.estimate(fixture.config, trajectory, values, hparams)
        batch = fixture.batch(key, hparams)._replace(advantages=estimates.advantages)
        grads = jax.grad(fixture.losses.policy, has_aux=True)(fixture.params, batch, hparams)[0]
        return -batch.mask.sum() / 64 * grads["params"]["actor_out"]["kernel"].ravel()

    samples = jax.lax.map(gradient, jax.random.split(jax.random.key(2), BATCHES))
    assert_mean(samples, fixture.exact(1.0))


def test_the_variance_falls_from_return_to_reward_to_go_to_baseline():
    keys = jax.random.split(jax.random.key(3), BATCHES)
    variance = {}
    for name in ("reinforce", "reinforce_to_go", "reinforce_baseline"):
        fixture = Fixture(name)
        if name == "reinforce_baseline":  # a constant: about the mean reward to go
            critic = jax.tree.map(jnp.zeros_like, fixture.params["params"]["critic_out"])
            mean = float(exact_return(jnp.zeros((HORIZON, STATES, ACTIONS)), 1.0)) / 2
            critic["bias"] = jnp.full((1,), mean)
            fixture.params["params"]["critic_out"] = critic
        variance[name] = float(jnp.var(fixture.gradients(keys, 1.0), axis=0).sum())
    whole, to_go, centred = variance.values()
    assert whole > 1.1 * to_go, variance
    assert to_go > 1.1 * centred, variance


def check(fixture, gamma):
    samples = fixture.gradients(jax.random.split(jax.random.key(2), BATCHES), gamma)
    assert_mean(samples, fixture.exact(gamma))


def assert_mean(samples, exact):
    """Within 4 standard errors, and the errors small enough to tell a wrong estimator."""
    samples = np.asarray(samples, np.float64)
    error = samples.std(axis=0) / np.sqrt(len(samples))
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)
    np.testing.assert_array_less(np.abs(samples.mean(axis=0) - exact), 4 * error + 1e-6)


def test_episodes_that_the_rollout_cuts_do_not_count():
    fixture = Fixture("reinforce")
    config = fixture.config.replace(num_steps=2)
    start = reset(fixture.env, (), jax.random.key(0), num_envs=64)
    policy = Policy(fixture.params, spec=fixture.spec)
    _, trajectory, _ = rollout(fixture.env, (), policy, start, jax.random.key(1), num_steps=2)
    estimates = fixture.row.estimate(config, trajectory, None, fixture.hparams())
    cut = ~np.asarray(trajectory.terminated).any(axis=0)
    assert cut.any()
    assert (~cut).any()
    assert not np.asarray(estimates.mask)[:, cut].any()
    assert np.asarray(estimates.mask)[0, ~cut].all()
    assert not np.asarray(estimates.advantages)[:, cut].any()


def test_trainer_uses_these_stages():
    """The trainer's own update of REINFORCE is one step along the gradient of its batch."""
    if "tabular" not in envs.names():
        envs.register("tabular", tabular_env)
    config = Config(
        env="tabular",
        algorithm="reinforce",
        num_envs=65536,
        num_steps=HORIZON,
        hidden_sizes=(),
        total_timesteps=65536 * HORIZON,
        optimizer="sgd",
        lr_schedule="constant",
    )
    trainer = make_trainer(config)
    fixture = Fixture("reinforce")
    state = jax.jit(trainer.init)(jax.random.key(0))
    state = state.replace(learner=state.learner.replace(params=fixture.params))
    hparams = fixture.hparams(learning_rate=1.0)
    after, metrics = jax.jit(trainer.step)(state, hparams)
    kernel = [
        np.asarray(p["params"]["actor_out"]["kernel"]).ravel()
        for p in (fixture.params, after.learner.params)
    ]
    exact = fixture.exact(1.0)
    moved = kernel[1] - kernel[0]
    assert np.linalg.norm(moved - exact) < 0.1 * np.linalg.norm(exact)
    assert metrics["episode/count"] == 65536
