"""Checks that need several devices; `test_devices` runs this in a process that has eight.

Devices are made before anything is computed, which a test session has long done.
"""

import functools
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import hlo
from ppo_jax import Config, ConfigError, HParams, envs, evaluate, make_trainer, resume, sweep, train
from ppo_jax.devices import make_mesh, over_members, population_mesh
from ppo_jax.population.pbt import make_pbt
from ppo_jax.runs import device_memory
from ppo_jax.runs.training import compile_training
from tests.test_agents import make_team
from tests.test_resume import check_resume, rows_of, stop_after

PARAMS = {"max_steps_in_episode": 16}


def config(algorithm, num_devices, **changes):
    fields = {"num_envs": 8, "num_steps": 16, "hidden_sizes": (16,), "env_params": PARAMS}
    return Config(
        algorithm=algorithm,
        num_devices=num_devices,
        total_timesteps=4 * 128,
        **{**fields, **changes},
    )


def on_one_device(function, *, mesh, in_specs, out_specs, check_vma):
    """Replaces `jax.shard_map` by `vmap` over the shards: the same mathematics on one device."""
    del in_specs, check_vma
    num_shards = mesh.shape["env"]

    def is_split(spec):
        return bool(len(spec))

    def call(state, hparams):
        specs = out_specs[0]

        def split(spec, part):
            def leaf(x):
                return x.reshape(num_shards, -1, *x.shape[1:]) if is_split(spec) else x

            return jax.tree.map(leaf, part)

        axes = jax.tree.map(lambda spec: 0 if is_split(spec) else None, specs)
        mapped = jax.vmap(function, in_axes=(axes, None), axis_name="env")
        state, metrics = mapped(jax.tree.map(split, specs, state), hparams)

        def join(spec, part):
            return jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[2:]) if is_split(spec) else agreed(x), part
            )

        return jax.tree.map(join, specs, state), jax.tree.map(agreed, metrics)

    return call


def agreed(x):
    """Returns the value that all shards have; NaN where they differ."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(jnp.ptp(x, axis=0) <= 1e-4, x[0], jnp.nan)
    return x[0]


def numbers(tree):
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return [np.asarray(x, np.float64) for x in leaves]


def check_devices_equal_shards_on_one_device(algorithm, **changes):
    described = config(algorithm, 4, **changes)
    state, metrics = jax.jit(make_trainer(described).run)(jax.random.key(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "shard_map", on_one_device)
        emulated = make_trainer(described).run  # new, for `jit` knows the other
        expected, expected_metrics = jax.jit(emulated)(jax.random.key(0))
    for ours, theirs in (
        (numbers(state.learner), numbers(expected.learner)),
        (numbers(state.statistics), numbers(expected.statistics)),
        (numbers(metrics), numbers(expected_metrics)),
    ):
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def check_steps_are_one_program_and_environments_stay_where_they_are():
    trainer = make_trainer(config("ppo", 4))
    traces = []
    step = jax.jit(lambda state: (traces.append(1), trainer.step(state))[1])
    state = jax.jit(trainer.init)(jax.random.key(0))
    for _ in range(3):
        assert len(state.rollout.obs.sharding.device_set) == 4
        assert state.rollout.obs.addressable_shards[0].data.shape[0] == 2
        state, metrics = step(state)
    assert len(traces) == 1
    # Every environment ends an episode within 16 steps, on whichever device it is.
    assert metrics["episode/count"] >= 8
    result = evaluate(
        trainer.policy(state), trainer.env, state.env_params, jax.random.key(1), 4, max_steps=20
    )
    assert result.finished.all()


def check_devices_see_different_data():
    trainer = make_trainer(config("ppo", 4))
    state = jax.jit(trainer.init)(jax.random.key(0))
    same = state.rollout.obs[:1].repeat(8, axis=0)
    env_state = jax.tree.map(lambda x: x[:1].repeat(8, axis=0), state.rollout.env_state)
    rollout = state.rollout.replace(obs=same, env_state=env_state)
    after, _ = jax.jit(trainer.step)(state.replace(rollout=rollout))
    assert len(np.unique(np.asarray(after.rollout.obs), axis=0)) == 8


def check_a_sweep_s_members_are_divided():
    described = config("ppo", 1).replace(num_envs=2)
    rates, said = [1e-4, 1e-3, 1e-2], []
    result = sweep(
        described,
        {"learning_rate": rates},
        seeds=2,
        eval_episodes=2,
        num_rows=4,
        say=said.append,
        progress=False,
    )
    assert said[-1].startswith("8 members together")  # six, and two that fill up the devices
    assert list(result.members["member"]) == list(range(6))
    run = jax.jit(make_trainer(described).run)
    for number, rate in enumerate(rates):
        _, metrics = run(jax.random.key(1), HParams(learning_rate=rate))
        curve = result.curves[result.curves["member"] == 2 * number + 1]
        entropy = metrics["train/entropy"].reshape(4, -1).mean(axis=1)
        np.testing.assert_allclose(curve["train/entropy"], entropy, rtol=1e-3)


def check_a_search_s_members_are_divided():
    described = Config(num_envs=2, num_steps=8, hidden_sizes=(4,), total_timesteps=3 * 16)
    trainer = make_trainer(described)
    rates = HParams(learning_rate=jnp.geomspace(1e-3, 1e-1, 8))
    keys = jax.random.split(jax.random.key(0), 8)
    found = []
    for member_map in (jax.vmap, over_members(make_mesh(member=8))):
        search = make_pbt(
            trainer, ["learning_rate"], num_rounds=3, updates_per_round=1, member_map=member_map
        )
        found.append(jax.jit(search.run)(keys, rates))
    (one, alone), (eight, divided) = found
    assert len(eight.states.updates_done.sharding.device_set) == 8
    np.testing.assert_array_equal(divided.parents, alone.parents)
    np.testing.assert_allclose(divided.scores, alone.scores, rtol=1e-3)
    for x, y in zip(numbers(eight.states.learner), numbers(one.states.learner), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def check_the_seeds_of_a_training_are_divided():
    described = config("ppo", 1).replace(num_envs=2)
    result = train(described, num_seeds=4, eval_episodes=2, progress=False)
    # From one of them, on fewer devices.
    start = jax.tree.map(lambda x: x[1], result.policy)
    still = HParams(learning_rate=0.0)
    tuned = train(described, still, start_from=start, eval_episodes=2, progress=False)
    jax.tree.map(np.testing.assert_array_equal, tuned.policy.params, start.params)
    assert len(result.state.updates_done.sharding.device_set) == 4
    assert result.evaluation.returns.shape == (4, 2)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    states, _ = jax.jit(jax.vmap(make_trainer(described).run))(keys)
    for x, y in zip(numbers(result.state.learner), numbers(states.learner), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@functools.cache
def both_axes():
    """Returns a training on eight devices, and its seeds trained alone on four of them."""
    described = config("ppo", 4, num_minibatches=2, normalize_obs=True, normalize_reward=True)
    alone = jax.jit(make_trainer(described).run)
    return described, [alone(jax.random.key(seed)) for seed in range(4)]


def check_seeds_and_environments_are_divided():
    described, expected = both_axes()
    result = train(described, num_seeds=4, eval_episodes=2, progress=False)
    for leaf in (result.state.rollout.obs, result.state.learner.params):
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(leaf))
    # Two members and two environments a device; parameters are those of two members.
    assert result.state.rollout.obs.addressable_shards[0].data.shape[:2] == (2, 2)
    kernel = jax.tree.leaves(result.state.learner.params)[0]
    assert kernel.addressable_shards[0].data.shape[0] == 2
    for i, (state, metrics) in enumerate(expected):
        ours = jax.tree.map(lambda x, i=i: x[i], (result.state.learner, result.state.statistics))
        for x, y in zip(numbers(ours), numbers((state.learner, state.statistics)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
        curve = result.metrics[result.metrics["seed"] == i]
        np.testing.assert_allclose(curve["train/entropy"], metrics["train/entropy"], rtol=1e-4)
        np.testing.assert_allclose(curve["episode/return"], metrics["episode/return"], rtol=1e-4)
    fewer = train(described, num_seeds=4, member_devices=1, eval_episodes=2, progress=False)
    assert len(fewer.state.updates_done.sharding.device_set) == 4
    np.testing.assert_allclose(
        fewer.metrics["train/entropy"], result.metrics["train/entropy"], rtol=1e-4
    )


def check_members_and_their_environments_are_divided():
    described, expected = both_axes()
    result = sweep(
        described,
        {"learning_rate": [2.5e-4, 1e-3]},
        seeds=2,
        eval_episodes=2,
        num_rows=4,
        progress=False,
    )
    assert result.is_complete
    for seed, (_, metrics) in enumerate(expected[:2]):
        curve = result.curves[result.curves["member"] == seed]
        np.testing.assert_allclose(curve["train/entropy"], metrics["train/entropy"], rtol=1e-4)
    others = result.curves[result.curves["member"] == 2]["train/entropy"]
    assert not np.allclose(others, expected[0][1]["train/entropy"], rtol=1e-4)


def check_devices_communicate_once_a_minibatch():
    described = config("ppo", 4, num_minibatches=2, normalize_obs=True, normalize_reward=True)
    mesh = population_mesh(4, env=4)
    trainer = make_trainer(described, mesh)
    keys = jax.random.split(jax.random.key(0), 4)
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_memory, "num_bytes", lambda x: texts.append(x.as_text()) or 0)
        compile_training(trainer, described, keys, trainer.hparams, mesh=mesh)
    program = hlo.parse(texts[1])
    # The loop over the updates of a piece has no fixed number of rounds, and counts as one.
    found = hlo.work(program, program.entry, hlo.Device(1.0, 1.0, 1.0), ["minibatches", "rollout"])
    assert found["rollout"].collectives == 0
    assert found["minibatches"].collectives == 4 * 2  # epochs and minibatches
    # Means and variances of advantages in each epoch; statistics of observations, rewards,
    # episodes and values.
    assert found["other"].collectives == 4 * 2 + 7
    groups = re.findall(r"replica_groups=(\S+),", texts[1])
    assert set(groups) == {"{{0,1,2,3},{4,5,6,7}}"}  # members exchange nothing


def check_seeds_use_as_many_devices_as_divide_them():
    assert [population_mesh(n).shape["member"] for n in (3, 6, 7, 12)] == [3, 6, 7, 6]
    assert population_mesh(6, env=2).shape == {"member": 3, "env": 2}


def check_meshes_that_do_not_fit_are_errors():
    for arguments, message in (
        ({"num_seeds": 4, "member_devices": 4}, "env=4 times member=4 and 8. Use fewer"),
        ({"num_seeds": 3, "member_devices": 2}, "got member=2 and 3. Use 1"),
        ({"member_devices": 2}, "divides seeds; got 2 and no num_seeds"),
        ({"num_seeds": 2, "member_devices": 0}, "member_devices must be a positive integer; got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config("ppo", 4), progress=False, **arguments)
    with pytest.raises(ConfigError, match="mesh axis env; got 4 and 2"):
        make_trainer(config("ppo", 4), make_mesh(env=2))


def check_runs_over_devices_resume_exactly(folder):
    """Stops two runs repeatedly: one that shares environments, one whose seeds are divided."""
    changes = {"memory": "gru", "memory_size": 4, "num_minibatches": 2}
    shared = config("ppo", 4, normalize_obs=True, normalize_reward=True, **changes)
    divided = config("ppo_adaptive", 1).replace(num_envs=2)
    for name, described, num_seeds in (("shared", shared, None), ("divided", divided, 4)):
        described = described.replace(total_timesteps=9 * described.batch_size)
        with pytest.MonkeyPatch.context() as patch:
            run = check_resume(
                described,
                folder / name,
                functools.partial(stop_after, patch),
                num_seeds=num_seeds,
                checkpoint_every=1e-9,
            )
        assert len(run.state.updates_done.sharding.device_set) == 4


def check_a_run_continues_on_other_devices(path):
    """Extends a finished run of four devices on two, and then on one."""
    total = 9 * 128
    for num_devices in (2, 1):
        before, total = total, total + 2 * 128
        message = f"made with num_devices {2 * num_devices}, now {num_devices}. .* other random"
        with pytest.warns(RuntimeWarning, match=message):
            run = resume(path, total_timesteps=total, num_devices=num_devices, progress=False)
        assert (run.timesteps_before, run.timesteps) == (before, total)
        assert len(run.state.rollout.obs.sharding.device_set) == num_devices
    assert [row["update"] for row in rows_of(path)] == [4, 8, 12, 13]
    assert np.isfinite(run.metrics["train/value_loss"]).all()


def check_agents_and_pools_are_divided():
    envs.register("team", make_team, overwrite=True)
    changes = {"env": "team", "env_params": {}, "num_envs": 24, "reset_pool": 4, "memory": "gru"}
    described = config("ppo", 4, memory_size=4, num_minibatches=2, **changes)
    trainer = make_trainer(described)
    state, metrics = jax.jit(trainer.run)(jax.random.key(0))
    assert state.rollout.env_state.bits.shape == (8, 3)
    assert len(state.rollout.env_state.bits.sharding.device_set) == 4
    assert np.isfinite(metrics["train/policy_loss"]).all()
    check_devices_equal_shards_on_one_device("ppo", memory_size=4, num_minibatches=2, **changes)


def check_one_device_too_many_is_an_error():
    with pytest.raises(ConfigError, match="as many devices as there are; got num_devices=16 and 8"):
        make_trainer(config("ppo", 16, num_envs=16))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for algorithm in ("trpo", "reinforce_baseline"):
        check_devices_equal_shards_on_one_device(algorithm)
    check_devices_equal_shards_on_one_device(
        "ppo_adaptive",
        memory="gru",
        memory_size=8,
        num_minibatches=2,
        normalize_obs=True,
        normalize_reward=True,
    )
    check_a_sweep_s_members_are_divided()
    check_a_search_s_members_are_divided()
    check_steps_are_one_program_and_environments_stay_where_they_are()
    check_devices_see_different_data()
    check_the_seeds_of_a_training_are_divided()
    check_seeds_and_environments_are_divided()
    check_members_and_their_environments_are_divided()
    check_devices_communicate_once_a_minibatch()
    check_seeds_use_as_many_devices_as_divide_them()
    check_meshes_that_do_not_fit_are_errors()
    check_agents_and_pools_are_divided()
    check_one_device_too_many_is_an_error()
    with tempfile.TemporaryDirectory() as folder:
        check_runs_over_devices_resume_exactly(Path(folder))
        check_a_run_continues_on_other_devices(Path(folder) / "shared" / "stopped")
    print("all checks passed")
