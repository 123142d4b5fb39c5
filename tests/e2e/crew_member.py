"""One process of a crew: runs a stage for each line that it reads, and answers its status."""

import importlib
import json
import os
import sys
from pathlib import Path

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what a stage prints is no answer

for line in sys.stdin:
    module, *arguments = json.loads(line)
    package = "" if Path(__file__).with_name(f"{module}.py").exists() else "stages."
    print(importlib.import_module(package + module).main(arguments), file=answers)
