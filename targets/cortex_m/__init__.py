"""Microcontrollers: kernels, profiles, a static executor on an emulated board."""
