"""Packed arrays have the bits of what was packed, and few arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.ops.packing import Packing, packed_scan, scan
from tests.test_platforms import as_accelerators_do

N = 3
BITS = np.array([0x7FC00001, 0xFF800000, 0x80000000], np.uint32)  # a NaN's payload, −∞, −0

TREE = {
    "reward": BITS.view(np.float32),
    "obs": np.arange(2 * N, dtype=np.float32).reshape(N, 2) / 3,
    "action": np.array([-1, 2**31 - 1, 0], np.int32),
    "done": np.array([True, False, True]),
    "image": np.arange(N * 2 * 5, dtype=np.uint8).reshape(N, 2, 5),
    "grid": np.arange(N * 8).reshape(N, 8) % 3 == 0,
    "half": np.array([[1.5, -0.0]] * N, np.float16),
    "key": np.array([[1, 2**32 - 1]] * N, np.uint32),
    "nothing": np.zeros((N, 0), np.float32),
}


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def shapes(packed):
    return {name: x.shape for name, x in packed.items()}


MANY = 12 * N
SHAPES_OF = {
    # Words, with the flags and the halves among them, and bytes.
    N: {f"{N} x 4 bytes": (N, 9), f"{N} x 1 bytes": (N, 18)},
    # With many rows, leaves of few elements have the rows as the last axis.
    MANY: {
        f"{MANY} x 4 bytes, narrow": (9, MANY),
        f"{MANY} x 1 bytes, narrow": (8, MANY),
        f"{MANY} x 1 bytes": (MANY, 10),
    },
}


def test_wide_leaves_can_stay_as_they_are():
    packing = Packing(packs_wide=False)
    tree = {**jax.tree.map(jnp.asarray, TREE), "key": jax.random.split(jax.random.key(0), N)}
    packed = packing.pack(tree)
    assert sorted(packed[name].shape for name in packed) == [(N,), (N, 2, 5), (N, 7), (N, 8)]
    found = packing.unpack(packed)
    assert found.pop("key") is tree.pop("key")
    jax.tree.map(assert_same_bits, found, tree)


@pytest.mark.parametrize("num_rows", SHAPES_OF)
def test_a_tree_is_unpacked_with_every_bit(num_rows):
    packing = Packing()
    tree = jax.tree.map(lambda x: np.concatenate([x] * (num_rows // N)), TREE)
    packed = packing.pack(jax.tree.map(jnp.asarray, tree))
    assert shapes(packed) == SHAPES_OF[num_rows]
    jax.tree.map(assert_same_bits, packing.unpack(packed), tree)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), packed)
    twice = jax.tree.map(lambda x: np.stack([x, x]), tree)
    jax.tree.map(assert_same_bits, packing.unpack(stacked), twice)


def test_random_keys_are_stored_as_they_are():
    packing = Packing()
    tree = {"key": jax.random.split(jax.random.key(0), N), "x": jnp.arange(N)}
    packed = packing.pack(tree)
    assert sorted(x.shape for x in packed.values()) == [(N,), (N, 1)]
    found = packing.unpack(packed)
    assert found["key"].dtype == tree["key"].dtype
    assert_same_bits(jax.random.key_data(found["key"]), jax.random.key_data(tree["key"]))


def test_double_precision_is_packed():
    with jax.enable_x64(True):
        packing = Packing()
        tree = {"x": jnp.array([0.1, 0.2], jnp.float64), "n": jnp.array([2**40, 1], jnp.int64)}
        packed = packing.pack(tree)
        assert shapes(packed) == {"2 x 8 bytes": (2, 2)}
        jax.tree.map(assert_same_bits, packing.unpack(packed), tree)


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_a_packed_scan_is_a_scan(batched, unroll):
    def step(carry, x):
        carry = jnp.sin(carry) + x
        return carry, {"carry": carry, "large": carry > 1.0, "both": carry * jnp.ones(4)}

    def scalars(carry, x):
        carry, outputs = step(carry, x)
        return carry, {name: outputs[name] for name in ("carry", "large")}

    inputs = jnp.linspace(0.0, 1.0, 7)

    def run(scan, carry):
        # A loop within a loop, as epochs and minibatches are.
        return scan(lambda c, x: scan(scalars, c + x, inputs), carry, inputs)

    start = jnp.arange(3.0) if batched else jnp.float32(0.5)
    apply = jax.vmap if batched else (lambda f: f)
    expected = jax.jit(apply(lambda c: run(jax.lax.scan, c)))(start)
    packed = partial(packed_scan, unroll=unroll)
    found = jax.jit(apply(lambda c: run(packed, c)))(start)
    jax.tree.map(assert_same_bits, found, expected)


def test_a_scan_gives_each_step_what_is_derived_from_its_carry(monkeypatch):
    def step(carry, double, x):
        return jnp.sin(carry) + x, {"carry": carry, "double": double}

    def run(inputs):
        return scan(step, jnp.float32(0.5), inputs, derive=lambda carry: 2.0 * carry)

    inputs = jnp.linspace(0.0, 1.0, 7)
    expected = jax.jit(run)(inputs)
    np.testing.assert_array_equal(expected[1]["double"], 2.0 * expected[1]["carry"])
    monkeypatch.setattr(jax.lax, "platform_dependent", as_accelerators_do)
    jax.tree.map(assert_same_bits, jax.jit(lambda x: run(x))(inputs), expected)
