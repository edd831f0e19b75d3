"""Suites of environments: the names of their tasks, and how to install them.

A module of this package adapts one suite, and is the only one that imports it. The names of tasks
are listed here, because importing a suite takes seconds, too long for a list of environments or for
the report of a misspelt name. A test compares the lists with the registries of the suites.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, NamedTuple

from ppo_jax.errors import ConfigError
from ppo_jax.lazy import submodules_of

if TYPE_CHECKING:
    from ppo_jax.envs.environment import Environment

__getattr__ = submodules_of(__name__)


class Suite(NamedTuple):
    """A package of environments. Its extra has the suite's name."""

    module: str
    """The package that is imported."""
    about: str
    tasks: tuple[str, ...]
    """Names of the tasks, without the suite's."""

    @property
    def is_installed(self) -> bool:
        """True if the package can be found; it is not imported."""
        return importlib.util.find_spec(self.module) is not None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GYMNAX_NAMES = (
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "DiscountingChain-bsuite",
    "MemoryChain-bsuite",
    "MNISTBandit-bsuite",
    "SimpleBandit-bsuite",
    "UmbrellaChain-bsuite",
    "BernoulliBandit-misc",
    "FourRooms-misc",
    "FrozenLake-misc",
    "GaussianBandit-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
    "Pong-misc",
    "Reacher-misc",
    "Swimmer-misc",
)
"""Environments of gymnax, which is a dependency; their names have no prefix."""

SUITES = {
    "brax": Suite(
        "brax",
        "continuous control, brax's own physics",
        _words(
            """
            ant fast halfcheetah hopper humanoid humanoidstandup inverted_double_pendulum
            inverted_pendulum pusher reacher swimmer walker2d
            """
        ),
    ),
    "craftax": Suite(
        "craftax",
        "open worlds: Crafter and NetHack in one",
        _words(
            """
            Craftax-Symbolic-v1 Craftax-Pixels-v1 Craftax-Classic-Symbolic-v1
            Craftax-Classic-Pixels-v1
            """
        ),
    ),
    "jaxmarl": Suite(
        "jaxmarl",
        "several agents that share a policy",
        _words(
            """
            MPE_simple_v3 MPE_simple_tag_v3 MPE_simple_world_comm_v3 MPE_simple_spread_v3
            MPE_simple_crypto_v3 MPE_simple_speaker_listener_v4 MPE_simple_push_v3
            MPE_simple_adversary_v3 MPE_simple_reference_v3 MPE_simple_facmac_v1
            MPE_simple_facmac_3a_v1 MPE_simple_facmac_6a_v1 MPE_simple_facmac_9a_v1 switch_riddle
            SMAX HeuristicEnemySMAX hanabi overcooked overcooked_v2 coin_game jaxnav
            """
        ),
    ),
    "jaxtari": Suite(
        "jaxtari",
        "Atari games, by their objects",
        _words(
            """
            airraid alien amidar assault asterix asteroids atlantis backgammon bankheist basicmath
            beamrider berzerk blackjack boxing breakout casinoblackjack casinofivestudpoker
            casinopokersolitaire centipede choppercommand donkeykong enduro fishingderby flagcapture
            freeway frostbite galaxian gopher gravitar hangman hauntedhouse humancannonball
            journeyescape kaboom kangaroo kingkong klax lasergates miniaturegolf montezumarevenge
            mspacman namethisgame othello pacman phoenix pong qbert riverraid roadrunner seaquest
            sirlancelot skiing slotmachine spaceinvaders spacewar surround tennis tetris timepilot
            tron turmoil upndown venture videocheckers videochess videocube videopinball wizardofwor
            wordzapper yarsrevenge
            """
        ),
    ),
    "jumanji": Suite(
        "jumanji",
        "puzzles, packing, routing and games",
        _words(
            """
            BinPack-v2 CVRP-v1 Cleaner-v0 Connector-v3 FlatPack-v0 Game2048-v1 GraphColoring-v1
            JobShop-v0 Knapsack-v1 LevelBasedForaging-v0 MMST-v0 Maze-v0 Minesweeper-v0 MultiCVRP-v0
            PacMan-v1 RobotWarehouse-v0 RubiksCube-partly-scrambled-v0 RubiksCube-v0
            SearchAndRescue-v0 SlidingTilePuzzle-v0 Snake-v1 Sokoban-v0 Sudoku-v0
            Sudoku-very-easy-v0 TSP-v1 Tetris-v0
            """
        ),
    ),
    "navix": Suite(
        "navix",
        "MiniGrid in JAX",
        _words(
            """
            Navix-Empty-5x5-v0 Navix-Empty-6x6-v0 Navix-Empty-8x8-v0 Navix-Empty-16x16-v0
            Navix-Empty-Random-5x5-v0 Navix-Empty-Random-6x6-v0 Navix-Empty-Random-8x8-v0
            Navix-Empty-Random-16x16-v0 Navix-DoorKey-5x5-v0 Navix-DoorKey-6x6-v0
            Navix-DoorKey-8x8-v0 Navix-DoorKey-16x16-v0 Navix-DoorKey-Random-5x5-v0
            Navix-DoorKey-Random-6x6-v0 Navix-DoorKey-Random-8x8-v0 Navix-DoorKey-Random-16x16-v0
            Navix-FourRooms-v0 Navix-KeyCorridorS3R1-v0 Navix-KeyCorridorS3R2-v0
            Navix-KeyCorridorS3R3-v0 Navix-KeyCorridorS4R3-v0 Navix-KeyCorridorS5R3-v0
            Navix-KeyCorridorS6R3-v0 Navix-LavaGapS5-v0 Navix-LavaGapS6-v0 Navix-LavaGapS7-v0
            Navix-SimpleCrossingS9N1-v0 Navix-SimpleCrossingS9N2-v0 Navix-SimpleCrossingS9N3-v0
            Navix-SimpleCrossingS11N5-v0 Navix-Dynamic-Obstacles-5x5-v0
            Navix-Dynamic-Obstacles-5x5-Random-v0 Navix-Dynamic-Obstacles-6x6-v0
            Navix-Dynamic-Obstacles-6x6-Random-v0 Navix-Dynamic-Obstacles-8x8-v0
            Navix-Dynamic-Obstacles-16x16-v0 Navix-DistShift1-v0 Navix-DistShift2-v0
            Navix-GoToDoor-5x5-v0 Navix-GoToDoor-6x6-v0 Navix-GoToDoor-8x8-v0
            """
        ),
    ),
    "octax": Suite(
        "octax",
        "CHIP-8 arcade games from pixels",
        _words(
            """
            airplane blinky brix cavern1 cavern2 cavern3 cavern5 cavern6 deep filter flight_runner
            missile pong rocket shooting_stars spacejam space_flight1 space_flight2 space_flight3
            space_flight4 space_flight5 space_flight6 space_flight7 space_flight8 space_flight9
            space_flight10 squash submarine tank target_shooter1 target_shooter2 target_shooter3
            tetris ufo vertical_brix wipe_off worm
            """
        ),
    ),
    "pgx": Suite(
        "pgx",
        "board and card games against an opponent",
        _words(
            """
            2048 animal_shogi backgammon chess connect_four gardner_chess go_9x9 go_19x19 hex
            kuhn_poker leduc_holdem minatar-asterix minatar-breakout minatar-freeway
            minatar-seaquest minatar-space_invaders othello shogi sparrow_mahjong tic_tac_toe
            """
        ),
    ),
    "playground": Suite(
        "mujoco_playground",
        "robots in MuJoCo: DeepMind Control, locomotion, manipulation",
        _words(
            """
            AcrobotSwingup AcrobotSwingupSparse BallInCup CartpoleBalance CartpoleBalanceSparse
            CartpoleSwingup CartpoleSwingupSparse CheetahRun FingerSpin FingerTurnEasy
            FingerTurnHard FishSwim HopperHop HopperStand HumanoidStand HumanoidWalk HumanoidRun
            PendulumSwingup PointMass ReacherEasy ReacherHard SwimmerSwimmer6 WalkerRun WalkerStand
            WalkerWalk ApolloJoystickFlatTerrain BarkourJoystick BerkeleyHumanoidJoystickFlatTerrain
            BerkeleyHumanoidJoystickRoughTerrain G1JoystickFlatTerrain G1JoystickRoughTerrain
            Go1JoystickFlatTerrain Go1JoystickRoughTerrain Go1Getup Go1Handstand Go1Footstand
            H1InplaceGaitTracking H1JoystickGaitTracking Op3Joystick SpotFlatTerrainJoystick
            SpotGetup SpotJoystickGaitTracking T1JoystickFlatTerrain T1JoystickRoughTerrain
            AlohaHandOver AlohaSinglePegInsertion PandaPickCube PandaPickCubeOrientation
            PandaPickCubeCartesian PandaOpenCabinet PandaRobotiqPushCube LeapCubeReorient
            LeapCubeRotateZAxis AeroCubeRotateZAxis
            """
        ),
    ),
    "xminigrid": Suite(
        "xminigrid",
        "MiniGrid and XLand: grids with rules that change",
        _words(
            """
            XLand-MiniGrid-R1-9x9 XLand-MiniGrid-R1-11x11 XLand-MiniGrid-R1-13x13
            XLand-MiniGrid-R1-15x15 XLand-MiniGrid-R1-17x17 XLand-MiniGrid-R2-9x9
            XLand-MiniGrid-R2-11x11 XLand-MiniGrid-R2-13x13 XLand-MiniGrid-R2-15x15
            XLand-MiniGrid-R2-17x17 XLand-MiniGrid-R4-9x9 XLand-MiniGrid-R4-11x11
            XLand-MiniGrid-R4-13x13 XLand-MiniGrid-R4-15x15 XLand-MiniGrid-R4-17x17
            XLand-MiniGrid-R6-13x13 XLand-MiniGrid-R6-17x17 XLand-MiniGrid-R6-19x19
            XLand-MiniGrid-R9-16x16 XLand-MiniGrid-R9-19x19 XLand-MiniGrid-R9-25x25
            MiniGrid-BlockedUnlockPickUp MiniGrid-DoorKey-5x5 MiniGrid-DoorKey-6x6
            MiniGrid-DoorKey-8x8 MiniGrid-DoorKey-16x16 MiniGrid-Empty-5x5 MiniGrid-Empty-6x6
            MiniGrid-Empty-8x8 MiniGrid-Empty-16x16 MiniGrid-EmptyRandom-5x5
            MiniGrid-EmptyRandom-6x6 MiniGrid-EmptyRandom-8x8 MiniGrid-EmptyRandom-16x16
            MiniGrid-FourRooms MiniGrid-LockedRoom MiniGrid-MemoryS8 MiniGrid-MemoryS16
            MiniGrid-MemoryS32 MiniGrid-MemoryS64 MiniGrid-MemoryS128 MiniGrid-Playground
            MiniGrid-Unlock MiniGrid-UnlockPickUp
            """
        ),
    ),
}

HOST_SUITES = {
    "ale": Suite("ale_py", "Atari games, stepped on the host", ()),
    "envpool": Suite("envpool", "Atari, MuJoCo and others in C++, stepped on the host", ()),
    "gymnasium": Suite("gymnasium", "every registered environment, stepped on the host", ()),
}
"""Suites whose environments are not in JAX. They take every task that their package registers."""


def make(name: str, **kwargs: Any) -> "Environment":
    """Builds the environment of a suite.

    Args:
      name: `suite:task`.
      **kwargs: arguments of the suite's constructor.

    Raises:
      ConfigError: the suite is not installed, or cannot be imported.
    """
    suite, _, task = name.partition(":")
    adapter = importlib.import_module(f"ppo_jax.envs.suites.{suite}")
    try:
        return adapter.make(task, **kwargs)._replace(name=name)
    except ImportError as error:
        # The extra also has packages that a suite imports and does not declare.
        module = (SUITES | HOST_SUITES)[suite].module
        what = "is not installed" if error.name == module else f"cannot be imported ({error})"
        raise ConfigError(
            f"{name} needs {module}, which {what}: pip install 'ppo-jax[{suite}]'."
        ) from error
