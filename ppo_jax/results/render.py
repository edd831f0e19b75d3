"""Episodes of a trained policy as a GIF, a video or a page."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.envs import make_env
from ppo_jax.envs.environment import Environment, Renderer
from ppo_jax.errors import ConfigError, require_positive_integers, require_seed
from ppo_jax.policy.policy import Policy
from ppo_jax.runs import files
from ppo_jax.runs.directory import RunDirectory
from ppo_jax.runs.lock import writable
from ppo_jax.runs.outputs import kind_of, require_output
from ppo_jax.runs.trained import load

_KEPT_BYTES = 2**30  # of the states of an episode, unless max_steps asks for more
_GIF_FRAMES_PER_SECOND = 25  # browsers slow down GIFs with more than 50, and files grow


class Episode(NamedTuple):
    """An episode of a policy."""

    states: list[Any]
    """States of the environment without its wrappers, in NumPy, from the reset to the end."""
    rewards: np.ndarray  # [T]
    is_complete: bool
    """False if the limit of steps cut the episode."""


def play(
    policy: Policy, env: Environment, keys: jax.Array, *, max_steps: int, greedy: bool = True
) -> list[Episode]:
    """Plays episodes and keeps their states.

    Args:
      policy: the policy that acts.
      env: the environment, with its parameters and a renderer.
      keys: random keys, one for each episode.
      max_steps: bound on the steps of an episode.
      greedy: take the most likely actions instead of sampling.

    Returns:
      One `Episode` for each key.

    Raises:
      ConfigError: the environment has no renderer.
    """
    renderer = _renderer_of(env)

    def one(policy: Policy, key: jax.Array) -> Any:
        reset_key, key = jax.random.split(key)
        obs, start = env.reset(reset_key, env.params)

        def one_step(carry: tuple, key: jax.Array) -> tuple:
            state, obs, recurrent_state = carry
            action_key, step_key = jax.random.split(key)
            action, recurrent_state = policy.act(
                obs, recurrent_state, None if greedy else action_key
            )
            step = env.step(step_key, state, action, env.params)
            done = jnp.logical_or(step.terminated, step.truncated)
            carry = step.state, step.obs, recurrent_state
            # Steps after the end are computed as well, and cut off on the host.
            return carry, (_inner(step.state, renderer), jnp.mean(step.reward), done)

        carry = start, obs, policy.initial_recurrent_state(env.agent_axes)
        found: tuple
        _, found = jax.lax.scan(one_step, carry, jax.random.split(key, max_steps))
        return _inner(start, renderer), *found

    # All episodes in one program, which is compiled once.
    results = jax.device_get(jax.jit(jax.vmap(one, in_axes=(None, 0)))(policy, keys))
    return [_episode(*jax.tree.map(lambda x, i=i: x[i], results)) for i in range(len(keys))]


def _episode(start: Any, states: Any, rewards: np.ndarray, done: np.ndarray) -> Episode:
    """Returns an episode, cut at its end, from the records of all steps."""
    ends = np.flatnonzero(done)
    length = int(ends[0]) + 1 if len(ends) else len(done)
    later = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(length)]
    return Episode([start, *later], rewards[:length], bool(len(ends)))


def _renderer_of(env: Environment) -> Renderer:
    if env.host is not None:
        raise ConfigError(
            f"episodes are drawn in an environment in JAX; {env.name} is stepped on the host. "
            "Render it with its own package, and the policy that ppo_jax.load returns."
        )
    if env.renderer is None:
        raise ConfigError(
            f"an environment must have a renderer to be drawn; {env.name} has none. Give it one: "
            "Environment(renderer=…), see docs/extending.md."
        )
    return env.renderer


def _inner(state: Any, renderer: Renderer) -> Any:
    """Returns the environment's own state inside those of its wrappers."""

    def is_own(x: Any) -> bool:
        return isinstance(x, renderer.state_type)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_own) if is_own(x)]
    if not found:
        raise ConfigError(
            f"a renderer's state_type must be the type of the environment's states; got "
            f"{renderer.state_type.__name__}, and a state is {type(state).__name__}."
        )
    return found[0]


def render_run(
    run_dir: str | Path,
    output: str | Path,
    *,
    num_episodes: int = 1,
    seed: int = 0,
    run_seed: int | None = None,
    greedy: bool = True,
    best: bool = False,
    max_steps: int | None = None,
    network: Any = None,
    overwrite: bool = False,
) -> list[float]:
    """Writes episodes of a run's policy as a GIF, an MP4 or a page.

    Args:
      run_dir: directory that `train` wrote.
      output: file that ends in .gif, .mp4 or .html. Tasks of brax are pages, whose viewer is loaded
        from the internet; a page has one episode.
      num_episodes: number of episodes, which follow one another.
      seed: random seed of the episodes.
      run_seed: seed whose policy is drawn, for a run of several seeds; None takes the first.
      greedy: take the most likely actions instead of sampling.
      best: the best policy while the run trained, instead of the last one.
      max_steps: bound on the steps of an episode; by default that of the environment, or 1000.
      network: the module that was `Config.network`, unless that was a name.
      overwrite: replace the output if it exists.

    Returns:
      The returns of the episodes.

    Raises:
      ConfigError: there is no run, its environment cannot be drawn in this way, or a package for it
        is missing.
    """
    require_positive_integers({"num_episodes": num_episodes, "max_steps": max_steps})
    require_seed(seed)
    path = require_output(Path(output), ("gif", "mp4", "html"), overwrite=overwrite)
    env, policy = _load(run_dir, run_seed=run_seed, best=best, network=network)
    renderer = _renderer_of(env)
    is_page = kind_of(path) == "html"
    if (renderer.page if is_page else renderer.frames) is None:
        other = "an .html page" if renderer.page is not None else "a .gif or an .mp4"
        raise ConfigError(f"{env.name} can be drawn as {other}; got {path}. Rename it.")
    if is_page and num_episodes > 1:
        raise ConfigError(f"a page has one episode; got {num_episodes}. Use one.")
    limit = max_steps or _limit(env)
    keys = jax.random.split(jax.random.key(seed), num_episodes)
    episodes = play(policy, env, keys, max_steps=limit, greedy=greedy)
    if max_steps is None and not all(episode.is_complete for episode in episodes):
        warnings.warn(
            f"an episode of {env.name} was cut after {limit} steps, and so is its return. Raise "
            "max_steps (--max-steps).",
            RuntimeWarning,
            stacklevel=2,
        )
    if is_page:
        assert renderer.page is not None, "checked above"
        text = renderer.page(episodes[0].states)
        with writable(path.parent, "the folder of the output"):
            files.write_text(path, text)
    else:
        write_video(path, draw(env, episodes), renderer.frames_per_second)
    return [float(episode.rewards.sum()) for episode in episodes]


def _load(
    run_dir: str | Path, *, run_seed: int | None, best: bool, network: Any
) -> tuple[Environment, Policy]:
    """Returns the environment and the policy of a run."""
    config, _ = RunDirectory.open(run_dir).read_config(network)
    return make_env(config), load(run_dir, seed=run_seed, best=best, network=network)


def _limit(env: Environment) -> int:
    """Returns the default bound on the steps of an episode."""
    # States of all steps are kept, also where an environment never ends an episode.
    longest = env.longest_episode(env.params)
    if longest is None:
        return 1000
    # A state of Craftax has 270 KB, and its limit is 100,000 steps.
    _, state = jax.eval_shape(env.reset, jax.random.key(0), env.params)
    num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return min(int(longest), max(1000, _KEPT_BYTES // max(1, num_bytes)))


def draw(env: Environment, episodes: Iterable[Episode]) -> Iterator[np.ndarray]:
    """Yields the frames of episodes, one after another."""
    renderer = _renderer_of(env)
    assert renderer.frames is not None, "the caller checks it"
    for episode in episodes:
        yield from renderer.frames(episode.states, env.params)


def write_video(path: Path, frames: Iterable[np.ndarray], frames_per_second: float) -> None:
    """Writes frames as a GIF or an MP4, by the suffix of the path.

    Raises:
      ConfigError: an MP4 needs a package that is not installed.
    """
    write = _write_gif if kind_of(path) == "gif" else _write_mp4
    with writable(path.parent, "the folder of the output"):
        files.write_file(path, lambda file: write(file, frames, frames_per_second))


def _write_gif(path: Path, frames: Iterable[np.ndarray], frames_per_second: float) -> None:
    from PIL import Image

    # A GIF counts in hundredths of a second.
    stride = math.ceil(frames_per_second / _GIF_FRAMES_PER_SECOND)
    duration = round(100 * stride / frames_per_second) * 10
    images: Sequence[Any] = [
        # Classic control and grids have few colours.
        Image.fromarray(frame).quantize(64)
        for i, frame in enumerate(frames)
        if i % stride == 0
    ]
    images[0].save(
        path,
        format="GIF",  # the name has no suffix until the file is complete
        save_all=True,
        append_images=images[1:],
        duration=duration,
        loop=0,
    )


def _write_mp4(path: Path, frames: Iterable[np.ndarray], frames_per_second: float) -> None:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ConfigError(
            "an MP4 needs imageio-ffmpeg, which is not installed: pip install 'ppo-jax[video]'. "
            "A GIF does not."
        ) from error
    writer = None
    try:
        for frame in frames:
            # The size of the frames is not known before the first.
            if writer is None:
                height, width = frame.shape[:2]
                writer = imageio_ffmpeg.write_frames(
                    str(path),
                    (width, height),
                    fps=frames_per_second,
                    macro_block_size=2,  # H.264 needs even sizes
                    output_params=["-f", "mp4"],
                )
                with warnings.catch_warnings():
                    # JAX warns of a fork; the child becomes ffmpeg at once.
                    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
                    writer.send(None)
            writer.send(np.ascontiguousarray(frame))
    finally:
        if writer is not None:
            writer.close()
