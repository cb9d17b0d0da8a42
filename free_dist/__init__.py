"""Adversarially trained early exits for frozen vision-language models."""

__version__ = "0.1.0"
