"""`python -m ppo_jax` is the command `ppo-jax`."""

import sys

from ppo_jax.cli import main

sys.exit(main())
