"""Answer requests of :mod:`seq2expr.model.process_trunk` inside another environment.

Runs under an interpreter that need not have seq2expr: this file imports numpy and the user's
script, nothing else, and keeps to syntax that older versions of Python know.

``trunk_worker.py FOLDER SCRIPT`` calls ``load(settings)`` of the script once. Then, for every
line on its input, it reads ``FOLDER/request.npy``, calls what ``load`` returned with it, writes
``FOLDER/answer.npy`` and says so with a line on its output.
"""

import importlib.util
import json
import os
import sys

import numpy as np


def serve(folder, script):
    """Load the script, and answer until the input ends."""
    # The output carries the answers only; whatever the script prints goes to the errors.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As if the script itself had been started: its neighbours can be imported, ours cannot.
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path = [path for path in sys.path if os.path.abspath(path) != own]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    spec = importlib.util.spec_from_file_location("trunk_script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(os.path.join(folder, "settings.json"), encoding="utf-8") as handle:
        compute = module.load(json.load(handle))
    for _ in sys.stdin:
        codes = np.load(os.path.join(folder, "request.npy"))
        values = np.asarray(compute(codes), dtype=np.float32)
        np.save(os.path.join(folder, "answer.npy"), values)
        said.write("done\n")
        said.flush()


if __name__ == "__main__":
    serve(*sys.argv[1:])
