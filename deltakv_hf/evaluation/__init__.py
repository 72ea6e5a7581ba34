"""How faithful a cache is, measured against the full cache: on plain text and in long-context tasks."""

from .fidelity import Fidelity, WindowFidelity, measure_fidelity
from .presses import Press, PressModel, measure_press_fidelity, pick_press, run_press_tasks
from .runner import make_contexts, run_tasks
from .scores import ItemScore, TaskScores
from .tasks import TASKS, Task, pick_tasks

__all__ = [
    "TASKS",
    "Fidelity",
    "ItemScore",
    "Press",
    "PressModel",
    "Task",
    "TaskScores",
    "WindowFidelity",
    "make_contexts",
    "measure_fidelity",
    "measure_press_fidelity",
    "pick_press",
    "pick_tasks",
    "run_press_tasks",
    "run_tasks",
]
