"""The process that measures presses: started in their environment, given a job, read line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import DeltaKVError

WORKER = Path(__file__).with_name("press_worker.py")


def answers(environment: Path, job: dict) -> Iterator[dict]:
    """What `press_worker.py` answers to `job`, as it comes; the process ends with the iteration, however that ends.

    Args:
        environment: a folder of packages, found before those of this process.
        job: what `press_worker.run` takes.

    Raises:
        DeltaKVError: the process failed; the message has the last line that it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "job.json"), Path(folder, "log.txt")
        path.write_text(json.dumps(job), encoding="utf-8")
        with open(log, "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, WORKER, path], stdout=subprocess.PIPE, stderr=errors, env=_variables(environment)
            )
        with process:
            try:
                for line in process.stdout:
                    yield json.loads(line)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            printed = log.read_text(encoding="utf-8", errors="replace")
            raise DeltaKVError(f"the process that measures presses ended ({process.returncode}): {last_line(printed)}")


def last_line(printed: str) -> str:
    """Of what a process printed, without empty lines."""
    return next((line.strip() for line in reversed(printed.split("\n")) if line.strip()), "it said nothing")


def _variables(environment: Path) -> dict[str, str]:
    paths = [str(environment), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
