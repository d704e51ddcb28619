"""The pretended GPU as a plugin file, for the processes of a run: ``--plugin tests/device/plugin.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pretend

pretend.install()
