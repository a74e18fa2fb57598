"""Speed and memory, measured."""

import sys
from importlib.util import find_spec
from pathlib import Path

# From the root of the repository this package is `benchmarks` too, where the one it measures need not be installed.
if find_spec("tsdsr") is None:
    sys.exit("tsdsr is not installed here; run `pip install --editable .` in the root of the repository first.")

# What the embedded model was baked of: modes change the network itself. It lies in the repository, not in a wheel.
EMBEDDED = Path(__file__).resolve().parent.parent / "training" / "bases" / "embedded" / "student"
