"""Names of the formats, which the command line needs before JAX is imported."""

from typing import Literal

Format = Literal["stablehlo", "onnx", "numpy", "web"]
