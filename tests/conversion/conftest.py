"""Lets test modules import their neighbours, and ranks import the test modules, whatever pytest's import mode."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
