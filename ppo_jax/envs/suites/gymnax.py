"""Adapter for environments of gymnax. The only module that imports gymnax."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs import spaces
from ppo_jax.envs.deferred import deferred
from ppo_jax.envs.environment import Environment, Renderer, Step, cast
from ppo_jax.envs.spaces import Box, Discrete, Leaf, MultiDiscrete, Space
from ppo_jax.errors import ConfigError

# Frames in a second by Gymnasium's metadata.
_CLASSIC_CONTROL = {
    "CartPole-v1": 50,
    "Acrobot-v1": 15,
    "MountainCar-v0": 30,
    "MountainCarContinuous-v0": 30,
    "Pendulum-v1": 30,
}
# Environments that gymnax's Visualizer draws by matplotlib, besides all of MinAtar.
_DRAWN = ("Catch-bsuite", "FourRooms-misc", "MetaMaze-misc", "PointRobot-misc", "Pong-misc")


def make(name: str, **kwargs: Any) -> Environment:
    """Builds the environment of that name from gymnax's registry."""
    env, _ = _gymnax().make(name, **kwargs)
    return adapt(name, env)


@functools.cache  # making the stand-ins takes time, too
def _gymnax() -> Any:
    """Imports gymnax with stand-ins for the plotting libraries of five of its environments.

    These libraries are nine tenths of the time of the import and 160 MiB of a process.
    """
    with deferred("matplotlib", "matplotlib.colors", "matplotlib.pyplot", "seaborn"):
        import gymnax
    return gymnax


def adapt(name: str, env: Any) -> Environment:
    """Converts an object with the interface of gymnax 1.x to an `Environment`.

    Rewards and observations are cast to the dtypes of their spaces, which four environments do not
    respect (Catch, UmbrellaChain, FourRooms, BernoulliBandit). MinAtar's grids of zeros and ones
    become bool, so that a trajectory of them takes a quarter of the memory.

    Raises:
      ConfigError: a space that no policy can handle.
    """
    if not hasattr(env, "is_truncated"):
        raise ConfigError(
            f"an environment must have the interface of gymnax 1.x, which tells truncation from "
            f"termination by is_truncated(state, params); {name} has an older one."
        )
    params = env.default_params
    observation_space = _space(name, env.observation_space(params))
    # gymnax declares them as float32, four times as large.
    is_minatar = type(env).__module__.startswith("gymnax.environments.minatar")
    if isinstance(observation_space, Box) and is_minatar:
        observation_space = observation_space._replace(dtype="bool")
    action_space = _action_space(name, env.action_space(params))

    transition = _without_reset(env)

    def cast_obs(obs: Any) -> Any:
        return cast(observation_space, obs)

    def reset(key: jax.Array, params: Any) -> tuple[Any, Any]:
        obs, state = env.reset(key, params)
        return cast_obs(obs), state

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> Step:
        if isinstance(action_space, Box):
            space = env.action_space(params)  # bounds may depend on traced parameters
            action = jnp.clip(action, space.low, space.high).astype(action_space.dtype)
        obs, state, reward, terminated, truncated = transition(key, state, action, params)
        reward = jnp.asarray(reward, jnp.float32)
        return Step(cast_obs(obs), state, reward, terminated, truncated)

    return Environment(
        name=name,
        reset=reset,
        step=step,
        params=params,
        observation_space=observation_space,
        action_space=action_space,
        renderer=_renderer(env),
    )


def _renderer(env: Any) -> Renderer | None:
    """Returns the renderer of an environment of gymnax, if it has one."""
    if not type(env).__module__.startswith("gymnax.environments."):
        return None
    from gymnax.environments.environment import EnvState

    if env.name in _CLASSIC_CONTROL:
        frames = functools.partial(_frames_of_gymnasium, env.name)
        return Renderer(EnvState, frames, frames_per_second=_CLASSIC_CONTROL[env.name])
    if env.name in _DRAWN or env.name.endswith("-MinAtar"):
        return Renderer(EnvState, functools.partial(_frames_of_matplotlib, env), None, 10)
    return None


def _frames_of_gymnasium(name: str, states: Sequence[Any], params: Any) -> Iterator[np.ndarray]:
    """Draws states by the environment of the same name in Gymnasium.

    `gymnax.visualize.vis_gym` makes an environment for each frame, which takes ten times as long.
    """
    import gymnasium
    from gymnax.visualize import vis_gym

    # pygame starts sound and a screen, and complains where there is none.
    drivers = [x for x in ("SDL_AUDIODRIVER", "SDL_VIDEODRIVER") if x not in os.environ]
    os.environ.update(dict.fromkeys(drivers, "dummy"))
    game = gymnasium.make(name, render_mode="rgb_array")
    game.reset()
    inner: Any = game.unwrapped
    vis_gym.set_gym_params(inner, name, params)
    try:
        for state in states:
            inner.state = vis_gym.get_gym_state(state, name)
            inner.last_u = np.ravel(getattr(state, "last_u", 0.0))[0]  # the arrow of Pendulum
            yield inner.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigError(
            f"pictures of {name} need pygame, which is not installed: pip install 'ppo-jax[video]'."
        ) from error
    finally:
        game.close()
        # An environment that shows a window may follow in the same process.
        for driver in drivers:
            os.environ.pop(driver, None)


def _frames_of_matplotlib(env: Any, states: Sequence[Any], params: Any) -> Iterator[np.ndarray]:
    """Draws states by gymnax's Visualizer."""
    import matplotlib.pyplot as plt
    from gymnax.visualize import Visualizer
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    visualizer = Visualizer(env, params, states)
    visualizer.fig.set_dpi(80)
    canvas = FigureCanvasAgg(visualizer.fig)  # whatever backend a notebook has
    try:
        visualizer.init()
        for i in range(len(states)):
            visualizer.update(i)
            canvas.draw()
            yield np.asarray(canvas.buffer_rgba())[..., :3].copy()
    finally:
        plt.close(visualizer.fig)


def _without_reset(env: Any) -> Callable[..., tuple]:
    """Returns `step` without its automatic reset, whose random numbers are half of its work."""

    def transition(key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        return obs, state, reward, terminated, env.is_truncated(state, params)

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
        _, state, reward, terminated, truncated, info = env.step(key, state, action, params)
        return info["final_observation"], state, reward, terminated, truncated

    # A class that overrides `step`, such as a wrapper, keeps its version. XLA drops its reset,
    # whose result is not used. DeepSea's version only keeps counts beyond an episode.
    step_of_class = type(env).step
    is_gymnax = step_of_class.__module__.startswith("gymnax.environments.")
    return transition if is_gymnax else step


def _space(name: str, space: Any) -> Space:
    """Converts gymnax's description of a space."""
    if hasattr(space, "spaces"):
        if hasattr(space.spaces, "items"):
            return spaces.Dict.of({key: _space(name, entry) for key, entry in space.spaces.items()})
        return spaces.Tuple(tuple(_space(name, entry) for entry in space.spaces))
    if hasattr(space, "nvec"):  # the name in gymnasium; gymnax has no such space
        return MultiDiscrete(tuple(map(int, space.nvec)))
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    if hasattr(space, "shape"):
        # Shapes may hold NumPy integers, which no file format takes.
        return Box(tuple(map(int, space.shape)), jnp.dtype(space.dtype).name)
    raise ConfigError(
        f"a space must be a Box, Discrete, MultiDiscrete, or a dict or tuple of them; {name} has "
        f"{space}. Describe it by one of these."
    )


def _action_space(name: str, space: Any) -> Leaf:
    ours = _space(name, space)
    if isinstance(ours, (Discrete, MultiDiscrete)):
        return ours
    if isinstance(ours, Box) and jnp.issubdtype(ours.dtype, jnp.floating):
        low, high = (
            tuple(np.broadcast_to(np.asarray(bound, float), ours.shape).ravel().tolist())
            for bound in (space.low, space.high)
        )
        return ours._replace(low=low, high=high)
    raise ConfigError(
        f"actions must be Discrete, MultiDiscrete or a floating-point Box; {name} has {space}. "
        "Choose another environment, or flatten its actions into one of these spaces."
    )
