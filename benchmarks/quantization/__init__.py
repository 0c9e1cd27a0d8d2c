"""Bitwright and other post-training quantizers on the zoo: same calibration samples, same held-out metrics."""
