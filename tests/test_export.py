"""Exported policies act as they did, in a process without this package."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppo_jax
from ppo_jax import Config, ConfigError, cli
from ppo_jax.envs import spaces
from ppo_jax.export.acting import make_act, obs_shapes, state_shapes
from ppo_jax.export.dense import dense_policy
from ppo_jax.export.files import FORMATS, export_run
from ppo_jax.ops.running_stats import RunningStats

BATCH = 5
PENDULUM = Config(env="Pendulum-v1", hidden_sizes=(8, 8))

CONFIGS = {
    "tanh": Config(hidden_sizes=(8, 8), normalize_obs=True),
    "relu": Config(hidden_sizes=(8,), activation="relu", layer_norm=True),
    "elu": Config(hidden_sizes=(8,), activation="elu"),
    "gelu": Config(hidden_sizes=(8,), activation="gelu"),
    "silu": Config(hidden_sizes=(8,), activation="silu", shared_torso=True),
    "linear": Config(hidden_sizes=()),
    "gaussian": PENDULUM.replace(normalize_obs=True),
    "std": PENDULUM.replace(state_dependent_std=True),
    "tanh_gaussian": PENDULUM.replace(action_distribution="tanh_gaussian"),
    "beta": PENDULUM.replace(action_distribution="beta"),
    "grid": Config(env="Breakout-MinAtar", hidden_sizes=(8,)),
    "convolutions": Config(env="Breakout-MinAtar", hidden_sizes=(8,), network="minatar_cnn"),
    "gru": Config(hidden_sizes=(8,), memory="gru", memory_size=4),
    "lstm": Config(hidden_sizes=(8,), memory="lstm", memory_size=4),
    "mingru": Config(hidden_sizes=(8,), memory="mingru", memory_size=4),
    "lru": Config(hidden_sizes=(8,), memory="lru", memory_size=4),
    "gtrxl": Config(hidden_sizes=(8,), memory="gtrxl", memory_size=4, memory_window=3),
    "dict": Config(
        hidden_sizes=(8,), wrappers={"previous_action_reward": True}, normalize_obs=True
    ),
}
WITHOUT_DENSE = {"convolutions", "gru", "lstm", "mingru", "lru", "gtrxl", "dict"}


@functools.cache
def policy_of(name):
    """A policy whose layers, biases and statistics all matter."""
    trainer = ppo_jax.make_trainer(CONFIGS[name])
    policy = trainer.policy(trainer.init(jax.random.key(0)))
    leaves, structure = jax.tree.flatten(policy.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    policy = policy.replace(params=jax.tree.unflatten(structure, noisy))
    if policy.obs_stats is None:
        return policy
    stats = tuple(
        None
        if x is None
        else RunningStats(jnp.float32(9), x.mean + 0.3, 0.5 * x.var + jnp.square(x.mean + 0.1))
        for x in policy.obs_stats
    )
    return policy.replace(obs_stats=stats)


def inputs_of(policy):
    rng = np.random.default_rng(0)

    def draw(x, largest=1):
        if x.dtype == bool:
            return rng.random(x.shape) < 0.5
        if jnp.issubdtype(x.dtype, jnp.integer):
            return rng.integers(0, largest + 1, x.shape).astype(x.dtype)
        return rng.normal(size=x.shape).astype(x.dtype)

    example = [jax.tree.map(draw, obs_shapes(policy, BATCH))]
    if policy.spec.memory is not None:
        # The integers of a state are how many steps a transformer remembers, here at most 3.
        draw_state = functools.partial(draw, largest=3)
        example.append(jax.tree.map(draw_state, state_shapes(policy, BATCH)))
    return example


WITHOUT_PACKAGE = """
import ast, importlib.util, json, sys
import numpy as np

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ppo_jax", "flax", "gymnax", *BLOCKED):
            raise ModuleNotFoundError(name)

BLOCKED = json.loads(sys.argv[2])
sys.meta_path.insert(0, Absent())
folder = __import__("pathlib").Path(sys.argv[1])

def stablehlo(path, leaves, structure):
    import jax
    program = jax.export.deserialize((path / "policy.stablehlo").read_bytes())
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    arguments = jax.tree.unflatten(jax.tree.structure(structure), leaves)
    return {jax.tree_util.keystr(where, simple=True, separator="_"): value
            for where, value in jax.tree_util.tree_flatten_with_path(program.call(*arguments))[0]}

def onnx(path, leaves, structure):
    import onnxruntime
    session = onnxruntime.InferenceSession(path / "policy.onnx")
    names = [x.name for x in session.get_inputs()]
    outputs = [x.name for x in session.get_outputs()]
    return dict(zip(outputs, session.run(None, dict(zip(names, leaves)))))

def numpy(path, leaves, structure):
    spec = importlib.util.spec_from_file_location("exported", path / "policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (obs,) = leaves
    one = module.policy(obs[0])
    return {"action": module.policy(obs), "outputs": module.outputs(obs), "first": one}

for path in folder.glob("*/*/inputs.npz"):
    arrays = np.load(path)
    leaves = [arrays[name] for name in sorted(arrays)]
    structure = ast.literal_eval((path.parent / "structure.txt").read_text())
    if path.parent.parent.name not in sys.argv[3:]:
        continue
    result = globals()[path.parent.parent.name](path.parent, leaves, structure)
    np.savez(path.parent / "results.npz", **{k: np.asarray(v) for k, v in result.items()})
assert not {"ppo_jax", "flax", "gymnax"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of exported policies in processes of their own, by format and policy."""
    folder = tmp_path_factory.mktemp("export")
    cases = [
        (kind, name)
        for kind in ("stablehlo", "onnx", "numpy")
        for name in CONFIGS
        if kind != "numpy" or name not in WITHOUT_DENSE
    ]
    for kind, name in cases:
        policy = policy_of(name)
        path = folder / kind / name
        path.mkdir(parents=True)
        for file, content in FORMATS[kind](policy).items():
            (path / file).write_bytes(content)
        inputs = inputs_of(policy)
        leaves = jax.tree.leaves(inputs)
        np.savez(path / "inputs.npz", **{f"{i:03}": x for i, x in enumerate(leaves)})
        structure = jax.tree.map(lambda _: 0, inputs)
        (path / "structure.txt").write_text(repr(structure))
    # NumPy's module needs no JAX, and ONNX none either.
    for blocked, kinds in (([], ["stablehlo"]), (["jax", "onnx"], ["onnx", "numpy"])):
        command = [sys.executable, "-c", WITHOUT_PACKAGE, str(folder), json.dumps(blocked), *kinds]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return {case: dict(np.load(folder.joinpath(*case) / "results.npz")) for case in cases}


def expected_of(name):
    """The policy's own actions, within the bounds of the environment, and next states."""
    policy = policy_of(name)
    obs, *state = inputs_of(policy)
    whole = None
    if state:
        # The critic's state plays no part in acting.
        zeros = policy.initial_recurrent_state((BATCH,))
        whole = {**zeros, "actor": jax.tree.map(jnp.asarray, state[0])}
    action, after = policy.act(obs, whole)
    space = policy.spec.action_space
    if isinstance(space, spaces.Box):
        action = np.clip(action, *(np.reshape(x, space.shape) for x in (space.low, space.high)))
    states = [] if after is None else jax.tree.leaves(after["actor"])
    return np.asarray(action), policy.step(obs, whole)[0], list(map(np.asarray, states))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["stablehlo", "onnx"])
def test_a_program_gives_actions_distributions_and_states(kind, name, results):
    found = results[kind, name]
    action, params, states = expected_of(name)
    np.testing.assert_allclose(found.pop("action"), action, rtol=1e-5, atol=1e-5)
    after = [found.pop(key) for key in sorted(found) if "state" in key]
    assert len(after) == len(states)
    for x, y in zip(after, states, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    expected = params._asdict() if hasattr(params, "_asdict") else {"logits": params}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in WITHOUT_DENSE])
def test_numpy_gives_actions_and_outputs(name, results):
    found = results["numpy", name]
    action, params, _ = expected_of(name)
    np.testing.assert_allclose(found["action"], action, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["first"], action[0], rtol=1e-5, atol=1e-5)
    if not hasattr(params, "_asdict"):
        np.testing.assert_allclose(found["outputs"], params, rtol=1e-5, atol=1e-5)


def test_actions_are_within_the_bounds():
    """A Gaussian's mean leaves the bounds, and the exported action does not."""
    policy = policy_of("gaussian")
    act = make_act(policy.replace(params=jax.tree.map(lambda x: 10 * x, policy.params)))
    result = act(*inputs_of(policy))
    assert jnp.abs(result["mean"]).max() > 2.0
    assert jnp.abs(result["action"]).max() == 2.0


@pytest.mark.parametrize("kind", ["numpy", "web"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convolutions", "minatar_cnn|CartPole"),
        ("gru", "a memory"),
        ("dict", "observations of several arrays|CartPole"),
    ],
)
def test_formats_of_dense_layers_refuse_others(kind, name, reason):
    with pytest.raises(ConfigError, match=reason):
        FORMATS[kind](policy_of(name))


def test_a_policy_that_jax2onnx_cannot_convert_is_named(monkeypatch):
    import jax2onnx

    def fail(*arguments, **options):
        raise NotImplementedError("no rule for scatter")

    monkeypatch.setattr(jax2onnx, "to_onnx", fail)
    with pytest.raises(ConfigError, match="it fails: no rule for scatter. Use stablehlo"):
        FORMATS["onnx"](policy_of("tanh"))
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'ppo-jax\[onnx\]'"):
        FORMATS["onnx"](policy_of("tanh"))


def test_dense_layers_become_gemm():
    import onnx

    model = onnx.load_from_string(FORMATS["onnx"](policy_of("tanh"))["policy.onnx"])
    assert "Gemm" in {node.op_type for node in model.graph.node}


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """A run whose policy plays CartPole well."""
    config, hparams = ppo_jax.preset("CartPole-v1", total_timesteps=100_000)
    path = tmp_path_factory.mktemp("cartpole") / "run"
    return ppo_jax.train(config, hparams, run_dir=path, progress=False)


def test_the_command_exports_and_replaces_nothing(cartpole, tmp_path, capsys):
    path = str(cartpole.run_dir)
    for kind in FORMATS:
        assert cli.main(["export", path, "--format", kind]) == 0
        assert f"export/{kind}" in capsys.readouterr().out
    assert cli.main(["export", path, "--format", "numpy"]) == 2
    assert "must be new" in capsys.readouterr().err
    mine = tmp_path / "policy.py"
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=r"policy\.py exists"):
        export_run(path, "numpy", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.py"]
    (tmp_path / "notes.txt").write_text("mine")
    export_run(path, "numpy", tmp_path, overwrite=True)
    assert "def policy" in mine.read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("name", ["tanh", "relu", "elu", "gelu", "silu", "linear", None])
def test_the_page_plays_as_the_policy_does(name, cartpole, tmp_path):
    policy = cartpole.policy if name is None else policy_of(name)
    page = tmp_path / "index.html"
    page.write_bytes(FORMATS["web"](policy)["index.html"])
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    data = dict(re.findall(r'data-([a-z-]+)="([^"]*)"', dom))
    assert float(data["difference"]) < 1e-5
    if name is None:
        assert float(data["mean-return"]) > 400
        assert cartpole.evaluation.returns.mean() > 400


def test_the_layers_of_a_policy_without_samples_are_not_normalised():
    trainer = ppo_jax.make_trainer(CONFIGS["tanh"])
    policy = trainer.policy(trainer.init(jax.random.key(0)))
    assert policy.obs_stats is not None
    assert not dense_policy(policy).is_normalized


def test_a_policy_in_half_precision_is_exported_in_single_precision():
    policy = policy_of("tanh")
    half = policy.replace(spec=dataclasses.replace(policy.spec, compute_dtype="bfloat16"))
    (obs,) = inputs_of(policy)
    assert not np.array_equal(half.action_params(obs), policy.action_params(obs))
    found, expected = make_act(half)(obs), make_act(policy)(obs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
