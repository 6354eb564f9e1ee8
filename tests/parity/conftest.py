"""Keeps transformers offline: the reference models are made on the spot, small and random."""

import os

# Set before the libraries are imported: they read them then.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads would only wait for models this small, and take the time of the other worker's.
os.environ["OMP_NUM_THREADS"] = "1"
