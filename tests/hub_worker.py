"""Calls functions of `deltakv_hf.hub` for a test, in a process of its own: the Hub's address is read at the import.

A line of JSON in, `[name, arguments, keywords]`; a line out, `{"value": ...}` or `{"error": [type, message]}`.
"""

import dataclasses
import json
import sys
import time

from deltakv_hf import hub

# no test waits between two attempts
time.sleep = lambda seconds: None
hub.PATIENCE = 0.5


def plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


for line in sys.stdin:
    name, arguments, keywords = json.loads(line)
    try:
        answer = {"value": getattr(hub, name)(*arguments, **keywords)}
    except Exception as error:
        answer = {"error": [type(error).__name__, str(error)]}
    print(json.dumps(answer, default=plain), flush=True)
