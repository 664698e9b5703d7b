"""What is measured of a model: how well it predicts, with intervals, and what it costs."""
