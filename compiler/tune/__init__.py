"""Searching the kernel templates' own parameters for the fastest way to compute each dot product."""
