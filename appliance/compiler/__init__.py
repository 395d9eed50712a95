"""Trained ONNX -> signed-off INT8 bundle: attach the heatmap, measure ranges once, quantise, build, gate, write."""
