"""The modules of ``benchmarks/`` can be imported."""

import sys

from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))
