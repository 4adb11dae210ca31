"""A trained model for elsewhere: its card, its ONNX form, the script that searches with it."""
