"""`python -m minicai` in the folder above a clone that is named minicai.

There Python takes the clone's folder for the package. This file hands over to the package in it.
"""

import runpy
import sys
from pathlib import Path

sys.modules.pop("minicai", None)
sys.path.insert(0, str(Path(__file__).parent))
runpy.run_module("minicai", run_name="__main__", alter_sys=True)
