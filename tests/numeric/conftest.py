"""Makes the helpers in this folder importable: pytest's importlib mode adds no folder to the path by itself."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
