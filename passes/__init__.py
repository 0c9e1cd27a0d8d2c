"""One rewrite a file, ONNX in, ONNX out."""
