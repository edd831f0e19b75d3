"""Careless and hostile input: only our own error, with a message, and nothing is executed."""

import ast
import contextlib
import copy
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppo_jax
from ppo_jax import Config, ConfigError, HParams
from ppo_jax.population import search_space
from ppo_jax.resolve import complete_config, complete_hparams
from ppo_jax.runs import checkpoint
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.policy_files import load_policy
from ppo_jax.runs.trained import evaluate_run

PACKAGE = Path(ppo_jax.__file__).parent

pytestmark = pytest.mark.xdist_group("hostile")

EXECUTING_CALLS = {"eval", "exec", "compile", "__import__", "input"}
EXECUTING_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_ATTRIBUTES = {
    "load_all",
    "unsafe_load",
    "full_load",
    "read_pickle",
    "to_pickle",
    "loads_pickle",
}


def violations(tree):
    """Returns the places of a syntax tree that can execute what a file holds."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in EXECUTING_MODULES for name in names):
            yield node.lineno
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in EXECUTING_CALLS:
                yield node.lineno
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                if function.attr in UNSAFE_ATTRIBUTES or (owner, function.attr) in (
                    ("yaml", "load"),
                    ("np", "load"),
                    ("numpy", "load"),
                    ("os", "system"),
                ):
                    yield node.lineno
            if any(k.arg in ("shell", "allow_pickle") for k in node.keywords):
                yield node.lineno


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_package_executes_no_file(path):
    assert list(violations(ast.parse(path.read_text()))) == []


def test_the_check_of_the_package_finds_what_it_looks_for():
    bad = (
        "import pickle\nfrom marshal import loads\neval('1')\nyaml.load(f)\nyaml.unsafe_load(f)\n"
        "np.load(f)\nsubprocess.run(x, shell=True)\npd.read_pickle(f)\nexec(s)\nos.system('ls')\n"
    )
    assert sorted(set(violations(ast.parse(bad)))) == list(range(1, 11))
    assert list(violations(ast.parse("yaml.safe_load(f)\nre.compile(s)\njax.eval_shape(f)"))) == []


def fuzz(function):
    """Runs a test 50 times, and 1,000 times in the slow set: FUZZ=1000."""
    count = int(os.environ.get("FUZZ", "50"))
    return settings(
        max_examples=count,
        deadline=10_000,  # nothing hangs
        derandomize=count == 50,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )(function)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["ppo", "adam", "CartPole-v1", "../../etc/passwd", "gru", "cnn", "linear", "1e400"]
    ),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=3),
    ),
    max_leaves=6,
)
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


class only_config_errors(contextlib.AbstractContextManager):  # noqa: N801
    """Lets errors of our own pass, which have a message."""

    def __exit__(self, kind, error, _):
        assert error is None or not isinstance(error, ConfigError) or len(str(error)) > 20
        return isinstance(error, ConfigError)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(Config)]), VALUES, max_size=4
    )
)
def test_settings_are_taken_or_refused(fields):
    with only_config_errors():
        config = Config(**fields)
        assert hash(config) == hash(copy.copy(config))
        complete_config(config)


@fuzz
@given(st.dictionaries(st.sampled_from(HParams.names()), VALUES, max_size=4))
def test_hyperparameters_are_taken_or_refused(values):
    with only_config_errors():
        complete_hparams(HParams(**values), Config())


@fuzz
@given(st.one_of(st.text(max_size=200), JSON.map(yaml.safe_dump), st.binary(max_size=50)))
def test_files_of_settings_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "space.yaml"
    path.write_bytes(
        content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    )
    with only_config_errors():
        space = search_space.read(path)
        parsed = {str(name): search_space.parse(entry) for name, entry in space.items()}
        search_space.rows(parsed, num_draws=2)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from([*HParams.names(), "num_envs", "hidden_sizes"]),
        st.one_of(
            st.text(max_size=20),
            st.sampled_from(["uniform", "loguniform", "choice"]).flatmap(
                lambda name: st.lists(SCALARS, max_size=3).map(
                    lambda values: f"{name}({','.join(map(str, values))})"
                )
            ),
        ),
        max_size=3,
    )
)
def test_entries_of_a_space_are_parsed_or_refused(space):
    with only_config_errors():
        parsed = {name: search_space.parse(entry) for name, entry in space.items()}
        has_draws = any(not isinstance(entry, list) for entry in parsed.values())
        search_space.rows(parsed, num_draws=2 if has_draws else None)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "run"
    config = Config(num_envs=2, num_steps=8, hidden_sizes=(4,), total_timesteps=64)
    ppo_jax.train(config, run_dir=path, eval_episodes=2, progress=False)
    return path


def changed(record, keys, value, rng):
    """Returns a record with one entry at a random place replaced or removed."""
    record = copy.deepcopy(record)
    place, depth = record, 0
    while True:
        names = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not names:
            return record
        name = names[rng % len(names)]
        rng //= len(names)
        depth += 1
        if isinstance(place[name], (dict, list)) and place[name] and depth < keys:
            place = place[name]
            continue
        if value == "remove":
            del place[name]
        else:
            place[name] = value
        return record


@fuzz
@given(st.integers(1, 3), st.one_of(JSON, st.just("remove")), st.integers(0, 2**40))
def test_configs_of_runs_are_read_or_refused(run_dir, tmp_path_factory, depth, value, place):
    path = tmp_path_factory.getbasetemp() / "changed-run"
    path.mkdir(exist_ok=True)
    record = json.loads((run_dir / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(changed(record, depth, value, place)))
    with only_config_errors():
        directory = RunDirectory.open(path)
        directory.read_config()
        directory.read_seeds()
        directory.read_options()
        evaluate_run(path, num_episodes=1)


@pytest.mark.parametrize("kind", ["checkpoint", "policy"])
@fuzz
@given(
    depth=st.integers(1, 4), value=st.one_of(JSON, st.just("remove")), place=st.integers(0, 2**40)
)
def test_forged_manifests_are_read_or_refused(run_dir, tmp_path_factory, kind, depth, value, place):
    source = run_dir / "policy"
    if kind == "checkpoint":
        (source,) = (run_dir / "checkpoints").iterdir()
    path = tmp_path_factory.getbasetemp() / f"changed-{kind}"
    shutil.copytree(source, path, dirs_exist_ok=True)
    record = json.loads((source / "manifest.json").read_text())
    del record["digest"]
    if kind == "policy":
        record["spec"] = json.loads(record["spec"])
    record = changed(record, depth, value, place)
    if kind == "policy" and "spec" in record:
        record["spec"] = json.dumps(record["spec"])
    with contextlib.suppress(ValueError):  # NaN, which `json` of the package never writes
        (path / "manifest.json").write_bytes(checkpoint._encode(record))
    with only_config_errors():
        (ppo_jax.load_state if kind == "checkpoint" else load_policy)(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep", "[" * 200_000),
        ("deep dict", '{"config":' * 100_000),
        ("huge", '{"config": "' + "x" * 2**24 + '"}'),
        ("list", "[]"),
        ("number", "1"),
        ("not text", b"\xff\xfe\x00"),
        ("nan", '{"config": NaN, "hparams": NaN, "seeds": NaN}'),
        ("empty", ""),
    ],
)
def test_configs_that_are_no_settings_are_refused(name, content, tmp_path):
    del name
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(content)
    for read in (evaluate_run, ppo_jax.load, ppo_jax.resume):
        with pytest.raises(ConfigError, match=r"config\.json"):
            read(tmp_path)


def test_a_run_that_would_take_too_much_memory_is_refused(run_dir, tmp_path):
    path = Path(shutil.copytree(run_dir, tmp_path / "run"))
    record = json.loads((path / "config.json").read_text())
    record["config"] |= {"num_envs": 2**20, "num_steps": 2**10, "total_timesteps": 2**31}
    (path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="fit the memory of its device"):
        ppo_jax.resume(path, progress=False)


def test_links_are_not_followed_when_checkpoints_are_removed(run_dir, tmp_path):
    path = Path(shutil.copytree(run_dir, tmp_path / "run"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    for name in ("000000000001", ".000000000001.removed", ".x.unfinished"):
        (path / "checkpoints" / name).symlink_to(outside, target_is_directory=True)
    ppo_jax.resume(path, total_timesteps=128, checkpoint_every=1e-9, progress=False)
    assert (outside / "mine").read_text() == "mine"


def test_a_payload_that_is_no_file_is_refused(run_dir, tmp_path):
    path = Path(shutil.copytree(run_dir / "policy", tmp_path / "policy"))
    (path / "state.safetensors").unlink()
    os.symlink("/dev/zero", path / "state.safetensors")
    with pytest.raises(ConfigError, match="is missing or has another size"):
        load_policy(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_in_a_policy_are_read_as_they_are(value, run_dir, tmp_path):
    """They are no fault of a file: a policy that diverged without the guard has them."""
    policy = ppo_jax.load(run_dir)
    broken = dataclasses.replace(policy, params={"params": _filled(policy.params["params"], value)})
    from ppo_jax.runs.policy_files import save_policy

    save_policy(broken, tmp_path / "policy")
    found = load_policy(tmp_path / "policy")
    np.testing.assert_array_equal(found.params["params"]["actor_out"]["bias"], value)


def _filled(tree, value):
    if isinstance(tree, dict):
        return {name: _filled(x, value) for name, x in tree.items()}
    return np.full(tree.shape, value, tree.dtype)
