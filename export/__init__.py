"""What production reads: the ONNX model, runtime configurations, the policy and its card."""
