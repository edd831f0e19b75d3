"""Memories: a sequence at once is the same as step by step, and what they remember is of use."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, evaluate, make_trainer
from ppo_jax.ops.gated_recurrence import output_of
from ppo_jax.policy.initializers import draw
from ppo_jax.policy.recurrent import RecurrentLayer
from ppo_jax.stages.collect import _values_in_sequence
from ppo_jax.stages.rollout import rollout
from tests.probes import PROBES, probe, probe_name

KINDS = ("gru", "lstm", "mingru", "lru")
T, N, F, SIZE = 13, 5, 3, 4


def initial_params(cell, key, *inputs):
    draw_key, init_key = jax.random.split(key)
    return draw(draw_key, cell.init(init_key, *inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_is_its_steps_with_resets_in_random_places(kind):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (T, N, F))
    start = jax.random.bernoulli(keys[1], 0.3, (T, N))
    cell = RecurrentLayer(kind, SIZE)
    zeros = cell.initial_state((N,))
    memory = jax.tree.map(lambda m: jax.random.normal(keys[2], m.shape), zeros)
    params = initial_params(cell, keys[3], memory, x, start)
    together = cell.apply(params, memory, x, start)
    for t in range(T):
        kept = jax.tree.map(
            lambda m, t=t: jnp.where(start[t][:, None], jnp.zeros_like(m), m), memory
        )
        after = cell.apply(params, kept, x[t][None], jnp.zeros((1, N), bool))
        memory = jax.tree.map(lambda m: m[0], after)
        for one, all_ in zip(jax.tree.leaves(memory), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(one, all_[t], rtol=1e-4, atol=1e-6)
    assert output_of(together).shape == (T, N, SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_episode_is_remembered_in_the_next(kind):
    keys = jax.random.split(jax.random.key(0), 2)
    cell = RecurrentLayer(kind, SIZE)
    memory = cell.initial_state((1,))
    x = jax.random.normal(keys[0], (4, 1, F))
    start = jnp.array([[True], [False], [True], [False]])
    params = initial_params(cell, keys[1], memory, x, start)

    def last(x):
        return jnp.sum(output_of(cell.apply(params, memory, x, start))[3])

    influence = np.abs(jax.grad(last)(x)).max(axis=(1, 2))
    assert (influence[:2] == 0).all()
    assert (influence[2:] > 0).all()


def test_min_gru_is_the_paper_s_recurrence():
    cell = RecurrentLayer("mingru", SIZE)
    x = jax.random.normal(jax.random.key(0), (T, 1, F))
    memory = jnp.ones((1, SIZE))
    start = jnp.zeros((T, 1), bool)
    params = initial_params(cell, jax.random.key(1), memory, x, start)
    gate, candidate = (params["params"][f"Dense_{i}"]["kernel"] for i in (0, 1))
    h = np.ones((1, SIZE))
    together = cell.apply(params, memory, x, start)
    for t in range(T):
        z = 1 / (1 + np.exp(-np.asarray(x[t] @ gate)))
        h = (1 - z) * h + z * np.asarray(x[t] @ candidate)
        np.testing.assert_allclose(together[t], h, rtol=1e-4, atol=1e-5)


def test_lru_is_the_paper_s_recurrence():
    cell = RecurrentLayer("lru", SIZE)
    x = np.asarray(jax.random.normal(jax.random.key(0), (20, N, F)))
    start = np.asarray(jax.random.uniform(jax.random.key(1), (20, N)) < 0.2)
    keys = jax.random.split(jax.random.key(2), 2)
    memory = tuple(
        jax.random.normal(key, x.shape)
        for key, x in zip(keys, cell.initial_state((N,)), strict=True)
    )
    params = initial_params(cell, jax.random.key(3), memory, x, start)
    p = jax.tree.map(np.asarray, params["params"]["LRU_0"])
    decay = np.exp(-np.exp(p["nu"]) + 1j * np.exp(p["theta"]))
    assert ((np.abs(decay) > 0.9) & (np.abs(decay) < 0.999)).all()
    assert ((np.angle(decay) > 0) & (np.angle(decay) < np.pi / 10)).all()
    scale = np.sqrt(1 - np.abs(decay) ** 2)
    h = np.asarray(memory[0][:, :SIZE]) + 1j * np.asarray(memory[0][:, SIZE:])
    hidden, outputs = jax.jit(cell.apply)(params, memory, x, start)
    for t in range(20):
        b_x = x[t] @ p["B"]["kernel"]
        b_x = scale * (b_x[:, :SIZE] + 1j * b_x[:, SIZE:])
        h = np.where(start[t][:, None], 0, decay * h) + b_x
        parts = np.concatenate([h.real, h.imag], axis=-1)
        np.testing.assert_allclose(hidden[t], parts, rtol=1e-4, atol=1e-5)
        y = parts @ p["C"]["kernel"] + x[t] @ p["D"]["kernel"] + p["D"]["bias"]
        expected = y[:, :SIZE] / (1 + np.exp(-y[:, SIZE:]))
        np.testing.assert_allclose(outputs[t], expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_lru_is_that_of_its_steps_one_by_one():
    cell = RecurrentLayer("lru", SIZE)
    x = jax.random.normal(jax.random.key(0), (20, N, F))
    start = jax.random.uniform(jax.random.key(1), (20, N)) < 0.2
    memory = cell.initial_state((N,))
    params = initial_params(cell, jax.random.key(3), memory, x, start)

    def together(params, x):
        return jnp.sum(jnp.square(output_of(cell.apply(params, memory, x, start))))

    def one_by_one(params, x):
        def step(state, inputs):
            after = cell.apply(params, state, *(leaf[None] for leaf in inputs))
            return jax.tree.map(lambda leaf: leaf[0], after), output_of(after)[0]

        return jnp.sum(jnp.square(jax.lax.scan(step, memory, (x, start))[1]))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        *(jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (together, one_by_one)),
    )


# The sign is seen at time 0 only, and asked for two steps later.
RECALL = probe(
    observe=lambda s: jnp.stack([jnp.where(s.time == 0, s.sign, 0.0), jnp.float32(s.time)]),
    reward=lambda s, a: jnp.where(s.time == 2, s.sign * (2.0 * a - 1.0), 0.0),
    terminal_time=3,
)
# As the time-limit probe, but only who remembers when B began knows that it is B.
RECALL_LIMIT = probe(
    observe=lambda s: jnp.float32(s.time == 0)[None],
    reward=lambda s, a: s.time > 0,
    time_limit=4,
)
PROBES.update({"recall": RECALL, "recall-limit": RECALL_LIMIT})


def solve(name, **changes):
    fields = {"num_envs": 32, "num_steps": 16, "hidden_sizes": (16,)}
    if "memory" in changes:
        fields["memory_size"] = 16
    # A transformer's steps are expensive, and it learns from fewer of them.
    fields["total_timesteps"] = 20_000 if changes.get("memory") == "gtrxl" else 60_000
    config = Config(env=probe_name(name), **{**fields, **changes})
    trainer = make_trainer(config)
    hparams = HParams(gamma=0.9, ent_coef=0.0, learning_rate=5e-3)
    state, metrics = jax.jit(trainer.run)(jax.random.key(0), hparams)
    return trainer, state, metrics


@pytest.mark.parametrize(
    ("kind", "shared_torso"),
    [
        *((kind, False) for kind in (*KINDS, "gtrxl")),
        ("gru", True),
        pytest.param("gtrxl", True, marks=pytest.mark.slow),
    ],
)
def test_what_was_seen_is_recalled(kind, shared_torso):
    trainer, state, metrics = solve("recall", memory=kind, shared_torso=shared_torso)
    assert metrics["episode/return"][-1] > 0.9
    result = jax.jit(
        lambda policy: evaluate(policy, trainer.env, trainer.env.params, jax.random.key(1), 64)
    )(trainer.policy(state))
    assert result.returns.mean() > 0.95


def test_without_a_memory_it_cannot_be():
    _, _, metrics = solve("recall")
    assert abs(metrics["episode/return"][-10:].mean()) < 0.3


@pytest.mark.parametrize("kind", ["lstm", "mingru"])
def test_time_limits_are_not_deaths_for_a_policy_with_a_memory(kind):
    # Four steps an episode: a worth of ten comes in by many bootstraps.
    trainer, state, _ = solve("recall-limit", memory=kind, total_timesteps=160_000)
    policy = trainer.policy(state)
    obs = jnp.array([1.0, 0.0, 0.0])[:, None, None]
    start = jnp.array([True, False, False])[:, None]
    values, _ = policy.values(obs, policy.initial_recurrent_state((1,)), start)
    np.testing.assert_allclose(values[:, 0], [9.0, 10.0, 10.0], rtol=0.1)


def test_the_true_successor_is_evaluated_from_the_state_before_the_reset():
    """V(s'_t) is V(s_{t+1}) inside an episode, and not the value of the reset at its end.

    Blocks of steps have the values of all steps together.
    """
    config = Config(
        env=probe_name("recall-limit"),
        num_envs=3,
        num_steps=6,
        memory="lstm",
        memory_size=4,
        hidden_sizes=(4,),
        num_epochs=1,
        num_minibatches=1,
    )
    trainer = make_trainer(config)
    state = jax.jit(trainer.init)(jax.random.key(0))
    policy = trainer.policy(state)

    def first_two(state, key):
        start, carried = state.start, state.recurrent_state
        _, trajectory, _ = rollout(trainer.env, trainer.env.params, policy, state, key, num_steps=6)
        starts = jnp.concatenate([start[None], trajectory.done[:-1]])
        of_all, of_blocks = (
            _values_in_sequence(policy, trajectory, carried, starts, num_states=num_states)
            for num_states in (18, 7)
        )
        return trajectory, of_all, of_blocks

    trajectory, of_all, of_blocks = jax.jit(first_two)(state.rollout, jax.random.key(1))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), of_blocks, of_all)
    values, critic_state = of_all
    jax.tree.map(lambda x: np.testing.assert_equal(x.shape, (3, 4)), critic_state["critic"])
    goes_on = ~np.asarray(trajectory.done)[:-1]
    np.testing.assert_allclose(
        np.asarray(values.next_value)[:-1][goes_on],
        np.asarray(values.value)[1:][goes_on],
        rtol=1e-4,
        atol=1e-6,
    )
    assert not np.allclose(
        np.asarray(values.next_value)[:-1][~goes_on], np.asarray(values.value)[1:][~goes_on]
    )


def test_a_policy_with_a_memory_is_asked_by_act():
    trainer = make_trainer(Config(num_envs=4, num_steps=8, memory="gru", memory_size=4))
    policy = trainer.policy(jax.jit(trainer.init)(jax.random.key(0)))
    obs = jnp.ones(4)
    with pytest.raises(ConfigError, match=r"Call policy.act\(obs, recurrent_state, key\)"):
        policy(obs)
    for ask in (lambda: policy.act(obs, None), lambda: policy.value(obs)):
        with pytest.raises(ConfigError, match="needs its recurrent state"):
            ask()
    action, memory = policy.act(obs, policy.initial_recurrent_state())
    assert action.shape == ()
    assert memory["actor"].shape == (4,)
    many, memories = policy.act(jnp.ones((3, 2, 4)), policy.initial_recurrent_state((3, 2)))
    assert many.shape == (3, 2)
    np.testing.assert_allclose(memories["actor"][1, 1], memory["actor"], rtol=1e-5)


def test_minibatches_are_of_whole_environments():
    with pytest.raises(ConfigError, match="where a policy has a memory.*got 6 and 4. Try 3 or 6"):
        Config(num_envs=6, num_steps=8, num_minibatches=4, memory="gru")
