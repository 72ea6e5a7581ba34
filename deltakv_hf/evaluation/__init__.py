"""How faithful a cache is, measured against the full cache: on plain text and in long-context tasks."""

from .fidelity import Fidelity, WindowFidelity, measure_fidelity
from .runner import run_tasks
from .scores import ItemScore, TaskScores
from .tasks import TASKS, Task, pick_tasks

__all__ = [
    "TASKS",
    "Fidelity",
    "ItemScore",
    "Task",
    "TaskScores",
    "WindowFidelity",
    "measure_fidelity",
    "pick_tasks",
    "run_tasks",
]
