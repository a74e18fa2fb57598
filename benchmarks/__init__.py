"""Speed and memory, measured."""

import sys
from importlib.util import find_spec

# From the root of the repository this package is `benchmarks` too, where the one it measures need not be installed.
if find_spec("tsdsr") is None:
    sys.exit("tsdsr is not installed here; run `pip install --editable .` in the root of the repository first.")
