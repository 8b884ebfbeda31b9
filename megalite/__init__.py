"""megalite: train large language models with tensor, sequence and ZeRO data parallelism, from raw text to a
Hugging Face checkpoint. Start reading at `train.py`."""

__version__ = "0.1.0"
