"""A user module that imports foreign functions."""

from os import mkdir as make_folder
from subprocess import Popen

from torch.hub import load

__all__ = ["Popen", "load", "make_folder"]
