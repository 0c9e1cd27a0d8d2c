"""Measuring what operators really take on this machine, and writing it into a profile."""
