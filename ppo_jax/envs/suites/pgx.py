"""Adapter for the games of pgx, as one player sees them. The only module that imports pgx."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppo_jax.envs.environment import Environment, Step
from ppo_jax.envs.spaces import ACTION_MASK, Box, Dict, Discrete
from ppo_jax.errors import require_known

Opponent = Callable[[jax.Array, dict[str, jax.Array]], jax.Array]
"""`(key, obs) -> action`: plays for every other player, and sees what the agent would see."""


class State(NamedTuple):
    """State of one game."""

    game: Any
    agent: jax.Array
    """int32 []: number of the agent's player."""
    pending: jax.Array
    """float32 []: the agent's rewards of moves before its first turn, paid by the first step. A
    game may even be over by then."""


def _random(key: jax.Array, obs: dict[str, jax.Array]) -> jax.Array:
    return jax.random.categorical(key, jnp.where(obs[ACTION_MASK], 0.0, -jnp.inf))


def _first(key: jax.Array, obs: dict[str, jax.Array]) -> jax.Array:
    del key
    return jnp.argmax(obs[ACTION_MASK])


OPPONENTS: dict[str, Opponent] = {"random": _random, "first": _first}
"""Opponents by name: a legal move at random, and the legal move with the lowest number."""


def make(task: str, *, opponent: str | Opponent = "random", **kwargs: Any) -> Environment:
    """Builds a game of one agent against an opponent, who is part of the environment.

    The agent's player is drawn at each reset, so that it also moves second. A step is a move of the
    agent and those of all others until it is the agent's turn again; its reward is the sum of the
    agent's rewards. Illegal moves lose, so observations have an action mask.

    Args:
      task: id of the game.
      opponent: a key of `OPPONENTS`, or a function. Register an environment for a function:
        `envs.register("duel", lambda: pgx.make("chess", opponent=play))`.
      **kwargs: go to `pgx.make`.
    """
    import pgx

    if isinstance(opponent, str):
        require_known("opponent", opponent, OPPONENTS)
        opponent = OPPONENTS[opponent]
    play = opponent
    inner = pgx.make(task, **kwargs)
    start = jax.eval_shape(inner.init, jax.random.key(0))
    view = start.observation

    def observed(game: Any) -> dict[str, jax.Array]:
        return {"observation": game.observation, ACTION_MASK: game.legal_action_mask}

    def others_play(key: jax.Array, game: Any, agent: jax.Array) -> tuple[Any, jax.Array]:
        """Plays until it is the agent's turn; returns the game and the agent's rewards."""

        def is_waiting(carry: tuple) -> jax.Array:
            _, game, _ = carry
            return (game.current_player != agent) & ~game.terminated & ~game.truncated

        def move(carry: tuple) -> tuple:
            key, game, reward = carry
            key, move_key, step_key = jax.random.split(key, 3)
            game = inner.step(game, play(move_key, observed(game)), step_key)
            return key, game, reward + game.rewards[agent]

        first = (key, game, jnp.zeros((), jnp.float32))
        if inner.num_players == 1:
            return game, first[2]
        # Under `vmap` the loop runs until the slowest game waits for its agent, mostly once.
        _, game, reward = jax.lax.while_loop(is_waiting, move, first)
        return game, reward

    def reset(key: jax.Array, params: tuple[()]) -> tuple[Any, State]:
        del params
        init_key, agent_key, others_key = jax.random.split(key, 3)
        # The agent moves first or later whatever number a game gives to the player who begins.
        agent = jax.random.randint(agent_key, (), 0, inner.num_players)
        game, reward = others_play(others_key, inner.init(init_key), agent)
        return observed(game), State(game, agent, reward)

    def step(key: jax.Array, state: State, action: jax.Array, params: tuple[()]) -> Step:
        del params
        step_key, others_key = jax.random.split(key)
        game = inner.step(state.game, action, step_key)
        own = game.rewards[state.agent] + state.pending
        game, reward = others_play(others_key, game, state.agent)
        return Step(
            obs=observed(game),
            state=State(game, state.agent, jnp.zeros((), jnp.float32)),
            reward=jnp.asarray(own + reward, jnp.float32),
            terminated=game.terminated,
            truncated=game.truncated,
        )

    return Environment(
        name=task,
        reset=reset,
        step=step,
        params=(),
        observation_space=Dict.of(
            {
                "observation": Box(tuple(map(int, view.shape)), view.dtype.name),
                ACTION_MASK: Box(tuple(map(int, start.legal_action_mask.shape)), "bool"),
            }
        ),
        action_space=Discrete(int(inner.num_actions)),
    )
