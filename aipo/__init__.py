"""AIPO: reinforcement learning with verifiable rewards on the tokens that carry information about the answer."""

__version__ = "0.1.0"
