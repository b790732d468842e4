"""Fused operations of the training step. Each op is one file: signature, implementations, plain torch reference."""
