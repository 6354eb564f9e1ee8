"""lm: a JAX codebase for training and evaluating language models."""

__version__ = "0.1.0"
