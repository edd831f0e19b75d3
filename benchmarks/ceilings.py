"""Upper bounds on the speed of a training: each of its parts, measured without the others."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax import Config
from ppo_jax.policy.policy import Policy
from ppo_jax.policy.spec import init_params, network_of
from ppo_jax.profiling import UniformPolicy
from ppo_jax.resolve import resolve
from ppo_jax.stages.algorithm import UpdateInputs
from ppo_jax.stages.collect import collect
from ppo_jax.stages.losses import Losses
from ppo_jax.stages.rollout import reset, rollout
from ppo_jax.types import Batch, Learner, RolloutState, Shard, Statistics


class Arithmetic(NamedTuple):
    """Operations of the networks for one environment step, by the compiler's count."""

    flops: float
    bytes: float


class Stages:
    """The parts of a training, as functions of a key with as many updates as the training."""

    def __init__(self, config: Config) -> None:
        resolved = resolve(config)
        self.config, self.algorithm, self.env = resolved.config, resolved.algorithm, resolved.env
        self.spec, self.hparams = resolved.spec, resolved.hparams
        self.shard = Shard(config.num_envs)
        self.losses = Losses(self.config, self.spec, self.algorithm.objective, self.shard)
        self.rule = self.algorithm.update_rule(self.config, self.losses, resolved.optimizer)

    @property
    def num_epochs_and_minibatches(self) -> tuple[int, int]:
        """Epochs of an update, and minibatches of an epoch."""
        assert self.config.num_epochs is not None, "the config is complete"
        assert self.config.num_minibatches is not None, "the config is complete"
        return self.config.num_epochs, self.config.num_minibatches

    def init(self, key: jax.Array) -> Any:
        """Returns parameters, and environments at the start of an episode."""
        network_key, reset_key = jax.random.split(key)
        state = reset(self.env, self.env.params, reset_key, num_envs=self.config.num_envs)
        return init_params(self.spec, network_key, state.obs), state

    def environment(self, key: jax.Array) -> Any:
        """Steps environments with random actions, and keeps only the sum of the rewards."""
        params, state = self.init(key)
        outputs = jax.eval_shape(Policy(params, spec=self.spec).action_params, state.obs)
        uniform = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

        def update(state: RolloutState, key: jax.Array) -> tuple[RolloutState, jax.Array]:
            policy = UniformPolicy(uniform, spec=self.spec)
            env, params, steps = self.env, self.env.params, self.config.num_steps
            state, trajectory, _ = rollout(env, params, policy, state, key, num_steps=steps)
            return state, jnp.sum(trajectory.reward)

        return jax.lax.scan(update, state, jax.random.split(key, self.config.num_updates))

    def batch(self, params: Any, state: RolloutState, key: jax.Array) -> Batch:
        """Returns the data of one rollout."""
        policy = Policy(params, spec=self.spec)
        return collect(
            policy,
            state,
            Statistics(),
            config=self.config,
            algorithm=self.algorithm,
            env=self.env,
            env_params=self.env.params,
            hparams=self.hparams,
            key=key,
            shard=self.shard,
        ).batch

    def networks(self, key: jax.Array) -> Any:
        """Runs all passes through the networks and nothing between them.

        The actor runs step by step, the critic on observations and their successors, and gradients
        are those of a linear loss.
        """
        params, state = self.init(key)
        obs = self.batch(params, state, key).obs
        config, network = self.config, network_of(self.spec)
        num_epochs, num_minibatches = self.num_epochs_and_minibatches
        gradients = num_epochs * num_minibatches
        size = config.batch_size // num_minibatches
        some = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], obs)
        slopes = jax.tree.map(
            lambda x: jax.random.normal(key, x.shape), jax.eval_shape(network.apply, params, some)
        )

        def act(total: jax.Array, obs: Any) -> tuple[jax.Array, None]:
            return total + _sum(network.apply(params, obs, method="actor")[0]), None

        def evaluate(total: jax.Array, obs: Any) -> tuple[jax.Array, None]:
            twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), obs)
            return total + _sum(network.apply(params, twice, method="critic")[0]), None

        def loss(params: Any) -> jax.Array:
            outputs = network.apply(params, some)
            return _sum(jax.tree.map(jnp.multiply, outputs, slopes))

        def descend(params: Any, _: None) -> tuple[Any, None]:
            moved = jax.tree.map(lambda x, g: x - 1e-6 * g, params, jax.grad(loss)(params))
            return moved, None

        def update(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
            params, total = carry
            total, _ = jax.lax.scan(act, total, obs)
            # In blocks of the size of a minibatch, as a training evaluates them.
            steps = max(1, min(config.num_steps, size // config.num_envs))
            blocks = jax.tree.map(
                lambda x: x.reshape(-1, steps * config.num_envs, *x.shape[2:]), obs
            )
            total, _ = jax.lax.scan(evaluate, total, blocks)
            params, _ = jax.lax.scan(descend, params, length=gradients)
            return (params, total), None

        carry = params, jnp.zeros(())
        return jax.lax.scan(update, carry, length=config.num_updates)[0]

    def update(self, key: jax.Array) -> Any:
        """Runs all updates on the data of one rollout."""
        params, state = self.init(key)
        batch = self.batch(params, state, key)
        learner = Learner(params, self.rule.init(params, self.hparams))

        def step(learner: Learner, key: jax.Array) -> tuple[Learner, None]:
            inputs = UpdateInputs(batch, key, self.hparams, jnp.ones(()))
            params, rule_state, _ = self.rule.update(learner.params, learner.rule_state, inputs)
            return Learner(params, rule_state), None

        return jax.lax.scan(step, learner, jax.random.split(key, self.config.num_updates))

    def arithmetic(self) -> Arithmetic:
        """Counts the operations of acting, of evaluating states, and of all gradients."""
        config = self.config
        params, state = jax.eval_shape(self.init, jax.random.key(0))
        batch = jax.eval_shape(self.batch, params, state, jax.random.key(0))
        num_epochs, num_minibatches = self.num_epochs_and_minibatches
        size = config.batch_size // num_minibatches
        minibatch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape[2:]), x.dtype), batch
        )

        def gradient(params: Any, minibatch: Any) -> Any:
            return jax.grad(self.losses.joint, has_aux=True)(params, minibatch, self.hparams)[0]

        parts = (
            (
                lambda p, obs: Policy(p, spec=self.spec).action_params(obs),
                state.obs,
                config.num_steps,
            ),
            (lambda p, obs: Policy(p, spec=self.spec).value(obs), batch.obs, 2),
            (gradient, minibatch, num_epochs * num_minibatches),
        )
        flops = accessed = 0.0
        for function, argument, times in parts:
            cost = jax.jit(function).lower(params, argument).compile().cost_analysis()
            assert cost is not None
            flops += times * cost["flops"]
            accessed += times * cost["bytes accessed"]
        return Arithmetic(flops / config.batch_size, accessed / config.batch_size)


def _sum(tree: Any) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.sum(x) for x in jax.tree.leaves(tree)]))


def matrix_flops_per_second() -> float:
    """Measures the rate of a large float32 matrix product at the default precision."""
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192
    x = jnp.ones((size, size))
    return 2 * size**3 / _median_seconds(jax.jit(lambda x: x @ x), x)


def copied_bytes_per_second() -> float:
    """Measures the bytes per second of adding one to an array that fits no cache."""
    x = jnp.ones(2**26)
    return 2 * x.nbytes / _median_seconds(jax.jit(lambda x: x + 1), x)


def _median_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    jax.block_until_ready(function(x))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
