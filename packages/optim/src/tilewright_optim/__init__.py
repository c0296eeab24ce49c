"""tilewright-optim."""
