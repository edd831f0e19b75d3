"""Adapter for Atari games of the Arcade Learning Environment, which are stepped on the host."""

from typing import Any

import numpy as np

from ppo_jax.envs import gymnasium_spaces, spaces
from ppo_jax.envs.environment import Environment
from ppo_jax.envs.host import (
    HostSource,
    HostStep,
    consecutive_seeds,
    explained,
    first_line,
    make_host_environment,
    refuse_arguments,
    with_rows,
)
from ppo_jax.errors import ConfigError, require_positive_integers, unknown_name

_SIZES = ("img_height", "img_width", "stack_num")
# Games that ale-py cannot start: it ends the process.
_UNSUPPORTED = ("combat", "joust", "maze_craze", "warlords")
_WHOLE_GAMES = {"reward_clipping": False, "episodic_life": False, "life_loss_info": False}


def make(task: str, **kwargs: Any) -> Environment:
    """Builds an Atari game in the vector environment of ale-py, with its preprocessing.

    By default the preprocessing is that of Mnih et al. 2015 (doi:10.1038/nature14236): an action is
    repeated for four frames, an observation `[84, 84, 4]` stacks four frames in shades of grey, and
    rewards are clipped to [-1, 1]. Evaluations play whole games with unclipped rewards.

    Args:
      task: a game, such as "MsPacman".
      **kwargs: arguments of `ale_py.vector_env.AtariVectorEnv`. `life_loss_info=True` ends an
        episode where a life is lost, and the game goes on; `episodic_life=True` starts a new game
        there.
    """
    import gymnasium
    from ale_py.vector_env import AtariVectorEnv

    refuse_arguments(kwargs, ("num_envs", "batch_size", "autoreset_mode"))
    roms = _roms()
    if task not in roms:
        raise unknown_name("game of ale", task, roms, listed_by="ppo-jax envs --suite ale")
    # ale-py checks these in a thread. An error there ends the process, or leaves it waiting.
    require_positive_integers({name: kwargs.get(name) for name in _SIZES})

    def make_envs(num_envs: int, **changes: bool) -> Any:
        # In this mode a step returns the new episode, and the true successor in its infos.
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        return AtariVectorEnv(roms[task], num_envs, autoreset_mode=mode, **{**kwargs, **changes})

    try:
        example = make_envs(1)
    except gymnasium.error.Error as error:
        raise ConfigError(
            f"env_kwargs must be what AtariVectorEnv takes; got {kwargs}: {first_line(error)}. "
            "Change or leave out env_kwargs."
        ) from error
    frames = np.empty(example.observation_space.shape, np.uint8)
    num_frames = kwargs.get("max_num_frames_per_episode", 108_000)
    return make_host_environment(
        f"ale:{task}",
        HostSource(
            lambda num_envs: _AtariEnvs(make_envs(num_envs)),
            steps_in_background=True,
            uses_all_cores=True,
            make_evaluation_envs=lambda num_envs: _AtariEnvs(make_envs(num_envs, **_WHOLE_GAMES)),
            time_limit="max_num_frames_per_episode",
        ),
        observation_space=spaces.Box(_as_channels(frames).shape[1:], "uint8"),
        action_space=gymnasium_spaces.action_space(example.single_action_space),
        longest_episode=-(-num_frames // kwargs.get("frameskip", 4)),
    )


def tasks() -> tuple[str, ...]:
    """Returns the names of the games that ale-py has."""
    return tuple(_roms())


def _roms() -> dict[str, str]:
    """Returns the names of ROMs by those of games: "ms_pacman" is that of "MsPacman"."""
    from ale_py import roms

    names = [rom for rom in roms.get_all_rom_ids() if rom not in _UNSUPPORTED]
    return {rom.title().replace("_", ""): rom for rom in names}


class _AtariEnvs:
    """Games in the vector environment of ale-py, whose threads step them in the background."""

    def __init__(self, envs: Any) -> None:
        self._envs = envs
        self._converted = gymnasium_spaces.action_converter(envs.single_action_space)

    def reset(self, seed: int) -> Any:
        """Starts an episode in each environment; their seeds are consecutive."""
        with explained("failed in a reset"):
            frames, infos = self._envs.reset(seed=consecutive_seeds(seed, self._envs.num_envs))
        self._first_frame = _first_frame_of(infos)
        return _as_channels(frames)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step."""
        with explained("failed in a step"):
            self._envs.send(self._converted(actions))

    def recv(self) -> HostStep:
        """Waits for the step."""
        with explained("failed in a step"):
            frames, reward, terminated, truncated, infos = self._envs.recv()
        obs = final_obs = _as_channels(frames)
        # With `life_loss_info` an episode that ends with a life ends no game. The next observation
        # is its true successor, and ale-py 0.12.1 writes no `final_obs`.
        before, self._first_frame = self._first_frame, _first_frame_of(infos)
        reset = np.flatnonzero((terminated | truncated) & (self._first_frame != before))
        if reset.size:
            final_obs = with_rows(obs, reset, _as_channels(infos["final_obs"][reset]))
        return HostStep(obs, reward.astype(np.float32), terminated, truncated, final_obs)

    def close(self) -> None:
        """Ends the threads, which belong to an object in C++."""
        self._envs.ale = None


def _first_frame_of(infos: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the number of the first frame of each game, `[N]`, which every reset changes."""
    return infos["frame_number"] - infos["episode_frame_number"]


def _as_channels(frames: np.ndarray) -> np.ndarray:
    """Turns stacked frames, `[N, S, H, W]` or `[N, S, H, W, 3]`, into channels `[N, H, W, C]`."""
    frames = np.moveaxis(frames, 1, 3)
    return np.ascontiguousarray(frames.reshape(*frames.shape[:3], -1))
