"""tilewright-bench."""
