"""SBX's PPO."""

import flax.linen as nn
from baselines import build_with
from sbx import PPO
from serving import serve

if __name__ == "__main__":
    serve(build_with(PPO, nn.tanh))
