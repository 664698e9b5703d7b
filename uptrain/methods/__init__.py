"""The mathematics: pure functions on arrays and tensors."""
