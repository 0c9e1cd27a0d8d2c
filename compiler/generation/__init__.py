"""The verb that generates text: a decoder in ONNX Runtime, its tokenizer, and what it did in which time."""
