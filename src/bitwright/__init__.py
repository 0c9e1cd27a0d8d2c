"""Bitwright: a hardware-aware quantizing compiler for ONNX models."""

__version__ = "0.1.0"
