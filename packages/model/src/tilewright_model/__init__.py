"""tilewright-model."""
