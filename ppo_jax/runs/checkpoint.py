"""Checkpoints: the exact state of a training, in a directory that is checked when it is read.

A checkpoint is a directory of two files. `state.safetensors` has the arrays by name; typed random
keys are stored as their data. `manifest.json` has the settings, the shapes and dtypes of the
arrays, and a SHA-256 of the first file. Both are checked before an array is made, and nothing is
unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ppo_jax.config import Config
from ppo_jax.errors import ConfigError
from ppo_jax.hparams import HParams
from ppo_jax.runs import files, provenance
from ppo_jax.runs.settings import settings_from_plain, settings_to_plain, to_plain
from ppo_jax.trainer import make_trainer
from ppo_jax.types import TrainState

FORMAT = 1
_PAYLOAD, _MANIFEST = "state.safetensors", "manifest.json"
_FIELDS = {
    "format": int,
    "arrays": dict,
    "bytes": int,
    "keys": dict,
    "made_with": dict,
    "sha256": str,
}
_LARGEST_MANIFEST = 2**24  # bytes; a real manifest has a few thousand


OF_RUN = "run"
"""Prefix of the arrays in a run's checkpoint that are not part of the `TrainState`."""


class DamagedError(ConfigError):
    """A checkpoint is incomplete, or has changed since it was written."""


class SavedState(NamedTuple):
    """A state with the settings of its training."""

    state: TrainState
    config: Config
    hparams: HParams


def save_state(path: str | Path, state: TrainState, config: Config, hparams: HParams) -> None:
    """Writes the state of a training, of one or of several members, with its settings.

    On the same device and with the same versions, a training that continues from the state that
    `load_state` returns is bit-identical to one that was not interrupted.

    Args:
      path: directory to be written; one of the same name is replaced.
      state: as `trainer.init` or `trainer.step` returns it, or with leading axes of `jax.vmap`.
      config: config of the trainer.
      hparams: hyperparameters of the training; arrays where they differ between members.
    """
    arrays, implementations = flatten(state)
    write(Path(path), arrays, {**settings_to_plain(config, hparams), "keys": implementations})


def load_state(path: str | Path, network: Any = None) -> SavedState:
    """Reads a state that `save_state` wrote, or the state in a checkpoint of a run.

    Args:
      path: the directory.
      network: the module that was `Config.network`, unless that was a name.

    Raises:
      ConfigError: there is no checkpoint, it is damaged, or it does not fit its own config.
    """
    path = Path(path)
    arrays, record = read(path)
    config, hparams = settings_from_plain(record, path / _MANIFEST, network)
    # Shapes do not depend on the devices, of which there may be fewer here.
    trainer = make_trainer(config.replace(num_devices=1))
    template = jax.eval_shape(trainer.init, jax.random.key(0))
    arrays = {name: x for name, x in arrays.items() if not name.startswith(f"{OF_RUN}/")}
    return SavedState(unflatten(template, arrays, record["keys"], path), config, hparams)


def flatten(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of a tree by name, and the implementations of its typed random keys."""
    arrays, implementations = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            implementations[name] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.asarray(leaf)
    return arrays, implementations


def unflatten(
    template: Any, arrays: Mapping[str, np.ndarray], keys: Mapping[str, str], path: Path
) -> Any:
    """Returns arrays as a tree.

    Args:
      template: a tree of shapes and dtypes. The arrays may have additional leading axes, as from
        `jax.vmap`, which must be the same for all of them.
      arrays: arrays by name, as `flatten` returns them.
      keys: implementations of the typed random keys, by name.
      path: path of the checkpoint, for error messages.

    Raises:
      ConfigError: names, shapes or dtypes differ from the template's.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {_name(path): leaf for path, leaf in leaves}
    different = sorted(set(wanted) ^ set(arrays))
    batch = None
    found = {}
    for name in wanted.keys() & arrays.keys():
        # The stored dtype is compared, because `jnp.asarray` makes float64 float32 without x64.
        leaf, array, dtype = wanted[name], jnp.asarray(arrays[name]), arrays[name].dtype
        if name in keys:
            try:
                array = jax.random.wrap_key_data(array, impl=keys[name])
            except (TypeError, ValueError) as error:
                different.append(f"{name}, which is not a random key: {error}")
                continue
        # A key may have another implementation, and so another dtype, than the template.
        same_dtype = dtype == leaf.dtype or name in keys
        axes = array.ndim - len(leaf.shape)
        leading = array.shape[:axes] if axes >= 0 else None
        batch = leading if batch is None else batch
        if not same_dtype or leading != batch or array.shape[axes:] != leaf.shape:
            different.append(
                f"{name} {dtype}{list(array.shape)} instead of {leaf.dtype}{list(leaf.shape)}"
            )
        found[name] = array
    if different:
        raise ConfigError(
            f"a checkpoint must fit its settings; {path} differs in {'; '.join(different[:5])}"
            f"{' and more' if len(different) > 5 else ''}. Continue it with the settings, the "
            "precision (JAX_ENABLE_X64) and the version of the package that it was made with."
        )
    return jax.tree.unflatten(treedef, [found[name] for name in wanted])


def write(path: Path, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Writes a checkpoint of arrays and a JSON record with "keys", as `flatten` returns them."""
    payload = safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in arrays.items()})
    manifest = {
        **to_plain(record),
        "format": FORMAT,
        "made_with": provenance.describe(),
        "arrays": {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()},
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    files.write_directory(path, {_PAYLOAD: payload, _MANIFEST: _encode(manifest)})


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a checkpoint's arrays and its record, and checks every byte of both.

    Raises:
      ConfigError: there is no checkpoint, or it is damaged.
    """
    manifest = _read_manifest(path)
    payload_path = path / _PAYLOAD
    # The size first, so that a file of another size is never loaded into memory.
    if not payload_path.is_file() or payload_path.stat().st_size != manifest["bytes"]:
        raise _damaged(path, f"{_PAYLOAD} is missing or has another size than the manifest says")
    payload = payload_path.read_bytes()
    if hashlib.sha256(payload).hexdigest() != manifest["sha256"]:
        raise _damaged(path, f"{_PAYLOAD} is not what was written")
    arrays = safetensors.numpy.load(payload)
    found = {name: [str(x.dtype), list(x.shape)] for name, x in arrays.items()}
    if found != manifest["arrays"]:
        raise _damaged(path, "its arrays are not those that the manifest lists")
    return arrays, manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not file.is_file():
        raise DamagedError(f"a checkpoint must hold {_MANIFEST}; {path} does not.")
    if file.stat().st_size > _LARGEST_MANIFEST:
        raise _damaged(path, f"{_MANIFEST} is too large")
    content = file.read_bytes()
    try:
        manifest = json.loads(content)
        # Encoding is deterministic: encoding the parsed manifest again reveals any changed byte.
        is_whole = _encode({k: v for k, v in manifest.items() if k != "digest"}) == content
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"{_MANIFEST} is not what was written") from error
    if not is_whole:
        raise _damaged(path, f"{_MANIFEST} is not what was written")
    missing = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if missing:
        raise _damaged(path, f"{_MANIFEST} lacks {', '.join(missing)}")
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"a checkpoint must have format {FORMAT}; {path} has {manifest['format']}. Read it "
            "with the version of the package that wrote it."
        )
    return manifest


def _encode(manifest: Mapping[str, Any]) -> bytes:
    """Returns a manifest as JSON with a digest of all of it."""
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**manifest, "digest": digest}, indent=1, sort_keys=True) + "\n").encode()


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"a checkpoint must be whole; {path} is damaged: {what}. Use another one.")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
