"""Metrics: pure functions of outputs, targets and scores."""
