"""One process of a crew: runs a stage for each line that it reads, and answers its status."""

import importlib
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what a stage prints is no answer

for line in sys.stdin:
    module, *arguments = json.loads(line)
    print(importlib.import_module(f"stages.{module}").main(arguments), file=answers)
