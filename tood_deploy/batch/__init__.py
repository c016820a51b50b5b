"""Detect objects in more images than one machine gets through, on Ray Data."""
