"""Parts of the training loop: what trains, on what, in which precision and on how many processes."""
