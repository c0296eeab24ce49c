"""tilewright-dist."""
