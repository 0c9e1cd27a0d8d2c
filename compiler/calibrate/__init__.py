"""Calibration: streaming statistics of activation tensors, and the methods that turn them into ranges."""
