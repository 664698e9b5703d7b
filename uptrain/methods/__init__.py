"""The mathematics of conversions: pure functions on arrays and tensors, and the registry of methods."""

from uptrain.methods.registry import METHODS

__all__ = ["METHODS"]
