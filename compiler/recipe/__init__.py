"""Recipes: how a model is to be quantized, as data."""
