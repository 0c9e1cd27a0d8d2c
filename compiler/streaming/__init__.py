"""Quantizing a model part by part: the weights of one part and the values between two parts are in memory, no more."""
