"""Stable-Baselines3's PPO."""

import torch
from baselines import build_with
from serving import serve
from stable_baselines3 import PPO

if __name__ == "__main__":
    torch.set_num_threads(1)  # faster than more for so small a network
    serve(build_with(PPO, torch.nn.Tanh))
