"""What runs a bundle. It needs onnxruntime and NumPy, never torch."""
