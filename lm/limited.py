"""Runs what executes a stranger's code, such as a chat template, in a process of its own, with
limits of time and memory.

    python -m lm.limited lm.data.templates:render < arguments.json > result.json

The process imports only what it runs, and answers in JSON.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 20
MEMORY_BYTES = 2**31
ANSWER_BYTES = 2**24


def call(function: str, **arguments) -> Any:
    """Returns the result of a function of lm, run with limits.

    Args:
      function: "module:name", of this package.
      arguments: JSON-able.

    Raises:
      ValueError: what the function raises as one; or it took more than `SECONDS` or
        `MEMORY_BYTES`.
    """
    # Wherever this process found the package, the other finds it too.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "lm.limited", function],
            input=json.dumps(arguments),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it took more than {SECONDS} seconds") from None
    if finished.returncode:
        reason = (finished.stderr.strip() or "no word").splitlines()[-1][:300]
        raise ValueError(f"it failed, or took more than {MEMORY_BYTES / 2**30:g} GiB: {reason}")

    answer = json.loads(finished.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["result"]


def main(function: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    arguments = json.load(sys.stdin)
    module, _, name = function.partition(":")
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**arguments)}
    except ValueError as error:
        answer = {"error": str(error)}
    text = json.dumps(answer)
    if len(text) > ANSWER_BYTES:
        text = json.dumps({"error": f"its result has {len(text)} characters"})
    print(text)


if __name__ == "__main__":
    main(sys.argv[1])
