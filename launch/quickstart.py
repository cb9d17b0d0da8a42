#!/usr/bin/env python
"""The whole path on the embedded model and data: shards, adversarial training on three engines, decoding, measuring.

A second run reuses what the first one made; delete the run directory to start over.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from free_dist.cli import clear_errors
from free_dist.config import ConfigError, Recipe, load_recipe, parse_overrides, save_recipe

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "gan": ("CE+GAN", []),
    "ce": ("CE only", ["loss.adversarial_weight=0"]),
}
"""Directory below the run -> (name in tables, what differs from the recipe)."""
