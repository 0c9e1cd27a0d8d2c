"""Arm Ethos-U accelerators: an integer TFLite file, compiled by Vela."""
