"""Members of a population on several devices, which exchange nothing."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def member_sharding(num_devices: int) -> NamedSharding:
    """Of arrays whose first axis is that of members, `[S, ...]`."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("member",))
    return NamedSharding(mesh, PartitionSpec("member"))
