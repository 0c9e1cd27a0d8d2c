"""Choosing scales and rounding weights, with numpy alone: arrays in, arrays out."""
