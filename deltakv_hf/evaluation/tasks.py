"""Long-context tasks by name: what each makes from a tokenizer, a length, a seed and texts."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import InvalidOptionError
from . import generators
from .haystack import Sources
from .items import TaskContext


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: of the task; items depend on it.
        asks: what is asked, in a few words.
        generate: makes a context from tokenizer, most tokens, random numbers and texts.
    """

    name: str
    asks: str
    generate: Callable[[PreTrainedTokenizerBase, int, random.Random, Sources], TaskContext]

    def context(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int, sources: Sources) -> TaskContext:
        """One context with its items: the same for the same arguments, in any process.

        Args:
            tokenizer: of the model that shall read it.
            num_tokens: most tokens of the context, which has few less.
            seed: of what is hidden, where, and in which part of the text.
            sources: texts to hide it in.

        Returns:
            Ids of the context, and questions with their answers.

        Raises:
            InvalidOptionError: `num_tokens` is too small for the task, or a text has too little in it.
        """
        return self.generate(tokenizer, num_tokens, random.Random(f"{self.name}/{num_tokens}/{seed}"), sources)


TASKS = {
    task.name: task
    for task in (
        Task("passkey", "a five-digit key", generators.passkey),
        Task("niah4", "four numbers bound to words", generators.niah4),
        Task("variable_tracking", "the values of four variables", generators.variable_tracking),
        Task("cloze", "eight invented names bound to jobs", generators.cloze),
        Task("copy", "the text behind a cue, word for word", generators.copy),
        Task("few_shot", "classes that only the examples name", generators.few_shot),
    )
}


def pick_tasks(names: Iterable[str] = ()) -> list[Task]:
    """Finds tasks by name.

    Args:
        names: of tasks; none of them means all.

    Returns:
        The tasks, in the order given.

    Raises:
        InvalidOptionError: there is no such task.

    Examples:
        >>> from deltakv_hf.evaluation import pick_tasks
        >>> [task.asks for task in pick_tasks(["niah4"])]
        ['four numbers bound to words']
    """
    picked = list(dict.fromkeys(names)) or list(TASKS)
    for name in picked:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise InvalidOptionError(f"`task` must be one of {', '.join(TASKS)}, got {name!r}.{hint}")
    return [TASKS[name] for name in picked]
