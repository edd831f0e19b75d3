"""A policy as ONNX, by jax2onnx."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend

from ppo_jax.envs import spaces
from ppo_jax.errors import ConfigError
from ppo_jax.export.acting import make_act, obs_shapes, state_shapes
from ppo_jax.policy.policy import Policy

_BATCH = "B"


def to_onnx(policy: Policy) -> bytes:
    """Returns a policy as an ONNX model, for any number of observations.

    Inputs are `obs`, or an input for each entry of a dict observation, and `state_0`, … with a
    memory. Outputs are `action`, the parameters of the action distribution, and the next states.

    Raises:
      ConfigError: jax2onnx is not installed, or cannot convert this policy.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise ConfigError(
            "ONNX needs jax2onnx, which is not installed: pip install 'ppo-jax[onnx]'."
        ) from error
    # A model has a flat list of inputs and one of outputs.
    act = make_act(policy)
    has_memory = policy.spec.memory is not None
    example = [obs_shapes(policy, 1), *([state_shapes(policy, 1)] if has_memory else [])]
    leaves, structure = jax.tree.flatten(example)
    results = jax.eval_shape(act, *example)

    def flat(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(act(*jax.tree.unflatten(structure, arrays))))

    # It warns of every value without a type, which it then infers.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        model = jax2onnx.to_onnx(
            _for_any_platform(flat),
            [jax.ShapeDtypeStruct((_BATCH, *x.shape[1:]), x.dtype) for x in leaves],
            model_name="ppo_jax policy",
            input_names=_input_names(policy, len(leaves)),
            output_names=_output_names(results),
        )
    except Exception as error:  # of any operation that it does not know
        raise ConfigError(
            f"jax2onnx must convert every operation of the policy; it fails: {error}. Use "
            "stablehlo."
        ) from error
    return model.SerializeToString()


def describe_inputs(path: str | Path) -> str:
    """Returns the name, dtype and shape of each input of an ONNX file, as text."""
    import onnx

    def described(value: Any) -> str:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [str(x.dim_param or x.dim_value) for x in tensor.shape.dim]
        return f"{value.name}: {dtype} [{', '.join(['batch', *shape[1:]])}]"

    return ", ".join(map(described, onnx.load(path).graph.input))


def _input_names(policy: Policy, count: int) -> list[str]:
    """Returns a name for each array that the policy takes."""
    space = policy.spec.observation_space
    names = ["obs"]
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        paths = jax.tree_util.tree_flatten_with_path(obs_shapes(policy, 1))[0]
        names = [jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in paths]
    return names + [f"state_{i}" for i in range(count - len(names))]


def _output_names(results: dict[str, Any]) -> list[str]:
    """Returns a name for each array of the results, in the order of `jax.tree.leaves`."""
    names = []
    for name in sorted(results):
        count = len(jax.tree.leaves(results[name]))
        if name == "state":
            names += [f"next_state_{i}" for i in range(count)]
        else:
            names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
    return names


def _for_any_platform(function: Any) -> Any:
    """Returns a function without choices between platforms, which ONNX does not have.

    The branches for platforms that are not named are taken, and barriers are left out.
    """

    def run(*arguments: jax.Array) -> list[jax.Array]:
        closed = jax.make_jaxpr(function)(*arguments)
        return _evaluate(closed.jaxpr, closed.consts, arguments)

    return run


def _evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr as `_for_any_platform` does."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= zip(jaxpr.invars, arguments, strict=True)

    def read(x: Any) -> Any:
        return x.val if isinstance(x, jax.extend.core.Literal) else values[x]

    for equation in jaxpr.eqns:
        inputs, params = list(map(read, equation.invars)), equation.params
        match equation.primitive.name:
            # `jax.lax.platform_dependent` is this index and a `cond`; None stands for the others.
            case "platform_index":
                outputs = [params["platforms"].index(None)]
            case "cond" if isinstance(inputs[0], int):
                branch = params["branches"][inputs[0]]
                outputs = _evaluate(branch.jaxpr, branch.consts, inputs[1:])
            # A function inside may choose between platforms as well.
            case "jit":
                inner = params["jaxpr"]
                outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
            # Barriers steer XLA's fusions, and change no value.
            case "optimization_barrier":
                outputs = inputs
            case _:
                options = equation.primitive.get_bind_params(params)
                outputs = equation.primitive.bind(*inputs, **options)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
        values |= zip(equation.outvars, outputs, strict=True)
    return list(map(read, jaxpr.outvars))
