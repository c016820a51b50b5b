"""Evaluation: how good detections are, where they are wrong, and a report of it."""
