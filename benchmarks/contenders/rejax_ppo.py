"""rejax."""

from typing import Any

import gymnax
import jax
import jax.numpy as jnp
from jax_timing import compile_and_time
from rejax import PPO
from rejax.evaluate import evaluate
from serving import serve


def build(workload: dict[str, Any]) -> Any:
    """Compiles `PPO.train`, without the evaluations that it makes on the way."""
    names = ("num_envs", "num_steps", "total_timesteps", "num_epochs", "num_minibatches")
    shared = {name: workload["hparams"][name] for name in workload["hparams"]}
    shared.pop("value_clip_eps", None)  # it clips by clip_eps, always
    env, env_params = _environment(workload["env"], workload["env_kwargs"])
    algorithm = PPO.create(
        env=env,
        env_params=env_params,
        eval_freq=workload["total_timesteps"],
        skip_initial_evaluation=True,
        agent_kwargs={"activation": "tanh"},
        **{name: workload[name] for name in names},
        **shared,
    )
    silent = algorithm.replace(eval_callback=lambda algorithm, ts, rng: jnp.zeros(()))

    def returns_of(ts: Any) -> jax.Array:
        act = algorithm.make_act(ts)
        steps = env_params.max_steps_in_episode
        return evaluate(act, jax.random.PRNGKey(0), env, env_params, 64, steps)[1]

    evaluated = jax.jit(returns_of if workload["num_seeds"] is None else jax.vmap(returns_of))
    return compile_and_time(lambda key: silent.train(key)[0], evaluated, workload["num_seeds"])


def _environment(name: str, kwargs: dict[str, Any]) -> Any:
    if not name.startswith("brax:"):
        return gymnax.make(name, **kwargs)
    from rejax.compat.brax2gymnax import create_brax

    return create_brax(name.removeprefix("brax:"), **kwargs)


if __name__ == "__main__":
    serve(build)
