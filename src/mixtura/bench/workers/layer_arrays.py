"""Weights and tokens of a layer as files of numpy. Runs in the environment of a peer: numpy, and torch where it is."""

import os

import numpy as np


def read(folder, name):
    """An array as it was written; bfloat16 lies in it as uint16."""
    return np.load(os.path.join(folder, f"{name}.npy"))


def tensor(folder, name):
    """The same as a tensor."""
    import torch

    made = torch.from_numpy(read(folder, name))
    return made.view(torch.bfloat16) if made.dtype == torch.uint16 else made
