"""Read, write and prove checkpoint folders."""
