"""Quantization-aware training: the ONNX graph as a PyTorch module, trained as it will be rounded, written back as Q/DQ.

The only package that imports torch; nothing outside it does so before the verb ``train`` is called.
"""
