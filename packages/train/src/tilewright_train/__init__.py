"""tilewright-train."""
