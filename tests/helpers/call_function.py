"""Call what launching.spawn was asked for: call_function.py FILE, in each of its processes."""

import importlib
import os
import pickle
import sys
from pathlib import Path

path, module, name, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
sys.path[:] = path
getattr(importlib.import_module(module), name)(int(os.environ["SPAWNED_RANK"]), *arguments)
