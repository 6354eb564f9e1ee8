"""Nothing is downloaded: the reference models are made on the spot, small and random."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
