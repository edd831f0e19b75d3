"""Checkpoints: exact for every kind of training, and every damaged byte is noticed."""

import json
import shutil
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import Config, ConfigError, HParams, load_state, make_trainer, save_state
from ppo_jax.algorithms import ALGORITHMS
from ppo_jax.config import MemoryKind
from ppo_jax.defaults import OPTIMIZERS
from ppo_jax.runs.checkpoint import flatten, read, write
from ppo_jax.runs.policy_files import load_policy, save_policy

SMALL = {
    "num_envs": 2,
    "num_steps": 8,
    "hidden_sizes": (4,),
    "env_params": {"max_steps_in_episode": 8},
    "total_timesteps": 8 * 16,
}


def assert_same_bits(one, other):
    (arrays, keys), (arrays_read, keys_read) = flatten(one), flatten(other)
    assert keys == keys_read
    assert arrays.keys() == arrays_read.keys()
    for name, array in arrays.items():
        assert array.dtype == arrays_read[name].dtype, name
        assert array.tobytes() == arrays_read[name].tobytes(), name


KINDS = [
    *({"algorithm": name} for name in ALGORITHMS),
    *({"memory": name, "num_minibatches": 2} for name in get_args(MemoryKind)),
    *({"optimizer": name} for name in sorted(OPTIMIZERS)),
    {"normalize_obs": True, "normalize_reward": True},
    {"lr_schedule": "kl_adaptive"},
    {"wrappers": {"time_limit": 5, "sticky_actions": 0.25, "frame_stack": 2}},
    {"env": "Pendulum-v1", "action_distribution": "beta"},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values()))[:40])
def test_a_training_continues_from_a_file_bit_for_bit(kind, tmp_path):
    config = Config(**{**SMALL, **kind})
    trainer = make_trainer(config)
    step = jax.jit(trainer.step)
    state, _ = step(jax.jit(trainer.init)(jax.random.key(0)))
    save_state(tmp_path / "state", state, config, trainer.hparams)
    found = load_state(tmp_path / "state")
    assert (found.config, found.hparams) == (config, trainer.hparams)
    assert_same_bits(found.state, state)
    assert_same_bits(step(found.state), step(state))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_any_implementation_and_members_of_a_vmap_are_saved(implementation, tmp_path):
    config = Config(**SMALL)
    trainer = make_trainer(config)
    rates = HParams(learning_rate=jnp.array([1e-3, 1e-2, 1e-1]))
    keys = jax.random.split(jax.random.key(0, impl=implementation), 3)
    states = jax.jit(jax.vmap(trainer.init))(keys, rates)
    save_state(tmp_path / "states", states, config, rates)
    found = load_state(tmp_path / "states")
    assert str(jax.random.key_impl(found.state.key)) == implementation
    np.testing.assert_array_equal(found.hparams.learning_rate, rates.learning_rate)
    step = jax.jit(jax.vmap(trainer.step))
    assert_same_bits(step(found.state, found.hparams), step(states, rates))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = Config(**SMALL)
    trainer = make_trainer(config)
    path = tmp_path_factory.mktemp("saved") / "state"
    save_state(path, jax.jit(trainer.init)(jax.random.key(0)), config, trainer.hparams)
    return path


@pytest.mark.parametrize("kind", ["state", "policy"])
def test_every_changed_byte_is_noticed_and_named(kind, saved, tmp_path):
    source, read = saved, load_state
    if kind == "policy":
        found, source, read = load_state(saved), tmp_path / "policy", load_policy
        save_policy(make_trainer(found.config).policy(found.state), source)
    rng = np.random.default_rng(0)
    for i in range(500):
        name = ("state.safetensors", "manifest.json")[i % 2]
        path = tmp_path / "damaged"
        shutil.copytree(source, path, dirs_exist_ok=True)
        content = bytearray((path / name).read_bytes())
        content[rng.integers(len(content))] ^= rng.integers(1, 256)
        (path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"damaged is damaged: {name} is"):
            read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "state.safetensors").write_bytes(b""), "another size than"),
        (lambda path: (path / "state.safetensors").unlink(), "is missing or has another size"),
        (lambda path: (path / "manifest.json").write_bytes(b""), "manifest.json is not what was"),
        (lambda path: (path / "manifest.json").write_text("[" * 10**5), "is not what was written"),
        (lambda path: (path / "manifest.json").write_bytes(b" " * 2**25), "is too large"),
        (lambda path: (path / "manifest.json").unlink(), "a checkpoint must hold manifest.json"),
    ],
)
def test_files_that_are_cut_off_or_something_else_are_refused(damage, message, saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "state")
    damage(path)
    with pytest.raises(ConfigError, match=message):
        load_state(path)


def rewritten(path, change):
    """Changes the manifest as someone would who computes its digest, too."""
    from ppo_jax.runs.checkpoint import _encode

    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    change(manifest)
    (path / "manifest.json").write_bytes(_encode(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "must have format 1; .* has 2"),
        (lambda m: m["config"].update(num_envs=4), r"rollout/.* instead of"),
        (lambda m: m["config"].update(hidden_sizes=[8]), "a checkpoint must fit its settings"),
        (lambda m: m["config"].update(normalize_obs=True), "a checkpoint must fit its settings"),
        (lambda m: m["config"].update(num_envs=2**40), "num_envs"),
        (lambda m: m["config"].update(env="../../x"), "must be registered before"),
        (lambda m: m["arrays"].update(x=["float32", [2**40]]), "not those that the manifest"),
        (lambda m: m["hparams"].update(gamma=7.0), r"gamma must be in \[0, 1\]; got 7.0"),
    ],
)
def test_a_forged_manifest_is_refused(change, message, saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "state")
    rewritten(path, change)
    with pytest.raises(ConfigError, match=message):
        load_state(path)


def test_a_state_replaces_one_of_the_same_name_and_leaves_nothing_behind(saved, tmp_path):
    found = load_state(saved)
    for updates in (1, 2):
        state = found.state.replace(updates_done=jnp.int32(updates))
        save_state(tmp_path / "state", state, found.config, found.hparams)
        assert load_state(tmp_path / "state").state.updates_done == updates
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_record_with_numbers_of_numpy_is_written(tmp_path):
    """They come from settings such as `log_every=np.int64(4)`."""
    write(tmp_path / "state", {"x": np.zeros(2)}, {"updates": np.int64(3), "keys": {}})
    _, record = read(tmp_path / "state")
    assert record["updates"] == 3
