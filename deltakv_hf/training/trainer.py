"""`train`: from a model, texts and a compressor to a better compressor of the same bytes."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..attach import unwrap
from ..calibration.capture import LOSS_SCALE, Observer, evaluating
from ..calibration.inputs import calibration_windows, check_differentiable, check_ids, check_positions, sources_of
from ..calibration.report import measure, measured_row
from ..compressor.kv_compressor import KVCompressor
from ..config import check_integer
from ..errors import InvalidOptionError, TrainingError
from ..hf_compat import host_version
from .beginning import Form, begin_learned
from .modules import TrainableLearned, TrainableTransform
from .passes import continued_kl, paper_loss
from .settings import TrainingSettings
from .snapshot import Snapshot, snapshot_key

MODULES = {"transform": TrainableTransform, "learned": TrainableLearned}
# windows that a learned compressor begins with
BEGINNING = 16
# a held-out KL beyond so many times the first one is no way to a better compressor
DIVERGED = 10.0


@dataclass
class History:
    """What a training saw.

    Attributes:
        losses, norms: of every step, those of its gradients before they were scaled down.
        looks: `[step, held-out KL]`, the first before any step.
        stopped: why training ended before its last step, or None.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    looks: list[list[float]] = field(default_factory=list)
    stopped: str | None = None

    @property
    def best_kl(self) -> float:
        """Lowest held-out KL."""
        return min(kl for _, kl in self.looks if math.isfinite(kl))

    @property
    def best_step(self) -> int:
        """The step after which it was lowest."""
        return next(int(step) for step, kl in self.looks if kl == self.best_kl)


def train(
    model: PreTrainedModel,
    texts,
    compressor: KVCompressor | None = None,
    *,
    form: Form | None = None,
    tokenizer=None,
    workspace: str | os.PathLike | None = None,
    measured_windows: int | None = None,
    progress: Callable[[str, int], Callable[[], None]] = lambda stage, steps: lambda: None,
    **settings,
) -> KVCompressor:
    """Trains `compressor` through the frozen `model`; what it stores stays as large as it was.

    Of a calibrated compressor the vectors and the mean move, of a learned one the weights of its networks. Under
    `accelerate launch` every process takes windows of its own and all take the same steps.

    Args:
        model: on the device where training shall run, in any floating dtype; float32 where the KL is small.
        texts: documents, several sources as a dict by name (see `token_windows`), or ids `[n, window]` int64.
        compressor: where training begins; it is left as it is. May be None with `form`.
        form: train a learned compressor of this form, which begins at the principal components of residuals, in the
            metric of the calibrated `compressor` if there is one.
        tokenizer: of the model; None loads it from where the model came from.
        workspace: a file that keeps the state; a training that was broken off goes on from it. None keeps nothing.
        measured_windows: windows held out, to choose by and to stop by; None takes one for each source, but 4 at least,
            or a fifth of given ids, and 9 at most.
        progress: told of stages and steps.
        **settings: fields of `TrainingSettings`.

    Returns:
        the compressor of the best look at the held-out windows. Its `history` is a `History`, and its `config` notes
        the settings.

    Raises:
        InvalidOptionError: an argument is out of range, or there is too little text.
        CompressorError: `compressor` was made for another architecture.
        TrainingError: predictions are no numbers to begin with, or memory is short; the message says what to change.
    """
    model = unwrap(model)
    settings = TrainingSettings.from_options(settings)
    if measured_windows is not None:
        check_integer("measured_windows", measured_windows, low=1)
    check_differentiable(model)
    if compressor is None and form is None:
        raise InvalidOptionError(
            "`compressor` must be given without `form`, got None: load or calibrate one to begin at."
        )
    if compressor is not None:
        compressor.check_model(model)
        if compressor.config["kind"] not in MODULES:
            raise InvalidOptionError(
                f"`compressor` must be of kind {' or '.join(MODULES)}, got {compressor.config['kind']!r} in "
                f"{compressor.name}: others cannot be trained."
            )
    if isinstance(texts, torch.Tensor):
        settings = replace(settings, window=check_ids(model, texts).shape[1])
    calibration = settings.reading()
    check_positions(model, calibration)
    with torch.inference_mode(False):
        windows, held_out = calibration_windows(model, texts, tokenizer, calibration, measured_windows)
    if not len(windows) or not len(held_out):
        raise InvalidOptionError(
            f"`texts` must hold windows to learn from and others to measure on, got {len(windows)} and "
            f"{len(held_out)}: give more."
        )
    if form is not None:
        compressor = begin_learned(model, windows[:BEGINNING], compressor, form, settings.num_sink_tokens)
    with torch.inference_mode(False):
        # a copy: what was loaded in inference mode can be part of no gradient
        tensors = {name: tensor.clone() for name, tensor in compressor.tensors.items()}
        compressor = KVCompressor(compressor.config, tensors, compressor.name)
    key = snapshot_key(model, compressor, settings, windows, held_out)
    with evaluating(model), _frozen(model):
        run = _Training(model, compressor, settings, windows, held_out, Snapshot(workspace, key), progress)
        with _tensor_cores(model):
            run.run()
        trained = run.result(texts)
        fidelity = measure(model, trained, held_out, settings.window - settings.context, progress)
    trained.config |= {"share": trained.share, "measured": [measured_row(fidelity, trained.share)]}
    return trained


class _Training:
    """One training: modules, optimiser and what was seen."""

    def __init__(
        self, model, compressor: KVCompressor, settings: TrainingSettings, windows, held_out, snapshot, progress
    ):
        self.model, self.compressor, self.settings = model, compressor, settings
        self.windows, self.held_out, self.snapshot, self.progress = windows, held_out, snapshot, progress
        self.accelerator = Accelerator()
        self.observer = Observer(model)
        made = MODULES[compressor.config["kind"]]
        self.learning_rate = made.learning_rate if settings.learning_rate is None else settings.learning_rate
        self.modules = torch.nn.ModuleDict()
        for layer_idx, (key_width, value_width) in self.observer.widths.items():
            coder = compressor.layer(layer_idx, key_width, value_width, model.device)
            self.modules[str(layer_idx)] = made(coder)
        self.calls = {int(layer_idx): self._call(module) for layer_idx, module in self.modules.items()}
        # gradients are as small as the components' errors
        self.optimizer = torch.optim.Adam(self.modules.parameters(), betas=(0.9, 0.95), eps=1e-15)
        self.history = History()
        self.best = self._state()

    def _call(self, module):
        if not self.settings.gradient_checkpointing:
            return module
        return partial(checkpoint, module, use_reentrant=False)

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.modules.state_dict().items()}

    def run(self) -> None:
        """Steps until the last, or until nothing gets better."""
        held = self.snapshot.read()
        if held is not None:
            self._restore(held)
        advance = self.progress("training", self.settings.num_steps - len(self.history.losses))
        if not self.history.looks:
            self._look()
        while len(self.history.losses) < self.settings.num_steps and self.history.stopped is None:
            self._step()
            advance()
            done = len(self.history.losses)
            if done % self.settings.eval_every == 0 or done == self.settings.num_steps:
                self._look()
                self._save()

    def _step(self) -> None:
        number, settings = len(self.history.losses), self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * settings.rate(number)
        scale = LOSS_SCALE if self.model.dtype == torch.float16 else 1.0
        size, total = settings.gradient_accumulation_steps, 0.0
        for batch in range(number * size, (number + 1) * size):
            with torch.enable_grad(), _memory(settings):
                loss = self._loss(self._windows(batch), settings.context_of(batch))
                (loss * (scale / size)).backward()
            total += loss.item() / size
        total = self._mean(total)
        if not math.isfinite(total):
            self.history.stopped = f"the loss of step {number + 1} is {total}; lower `learning_rate`"
            return
        parameters = [p for p in self.modules.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean").div_(scale)
        self.history.losses.append(total)
        # a text that no one would write gives gradients a thousand times the usual
        most = settings.max_grad_ratio * statistics.median(self.history.norms) if number else math.inf
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.history.norms.append(norm.item())
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _windows(self, batch: int) -> torch.Tensor:
        """This process's windows of a batch, batches counted from the first step on."""
        size = self.settings.batch_size
        first = (batch * self.accelerator.num_processes + self.accelerator.process_index) * size
        return torch.stack([self._window(place) for place in range(first, first + size)])

    def _window(self, place: int) -> torch.Tensor:
        """All windows in a random order, then all in another."""
        turn, offset = divmod(place, len(self.windows))
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + turn)
        return self.windows[torch.randperm(len(self.windows), generator=generator)[offset]]

    def _loss(self, ids: torch.Tensor, context: int) -> torch.Tensor:
        settings = self.settings
        if settings.loss == "paper":
            return paper_loss(self.observer, self.calls, ids, settings.num_sink_tokens)
        predicted = settings.window - settings.context
        return self._kl(ids[:, : context + predicted], context)

    def _kl(self, ids: torch.Tensor, context: int) -> torch.Tensor:
        return continued_kl(self.observer, self.calls, ids, context, self.settings.stored(context))

    def _look(self) -> None:
        """Measures on the held-out windows, keeps the best, and says when to stop."""
        history, settings = self.history, self.settings
        with torch.no_grad(), _memory(settings):
            kls = [self._kl(ids[None], settings.context).item() for ids in self.held_out]
            kl = self._mean(sum(kls) / len(kls))
        if not history.looks and not math.isfinite(kl):
            raise TrainingError(
                f"`compressor` must give finite predictions to begin with, got a held-out KL of {kl}. Load the model "
                "in another dtype (bfloat16 or float32 for models trained so), or begin with another compressor."
            )
        history.looks.append([len(history.losses), kl])
        if kl == history.best_kl:
            self.best = self._state()
        behind = len(history.looks) - 1 - [look[1] for look in history.looks].index(history.best_kl)
        if not kl <= DIVERGED * history.looks[0][1]:
            history.stopped = f"held-out KL grew to {kl:.3g}"
        elif behind >= settings.patience:
            history.stopped = f"held-out KL was lowest {behind} looks ago"

    def _mean(self, number: float) -> float:
        """Of all processes, so that they decide alike."""
        return self.accelerator.reduce(torch.tensor(number, device=self.model.device), reduction="mean").item()

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = {f"now.{name}": tensor for name, tensor in self._state().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
        self.snapshot.write(tensors, asdict(self.history))

    def _restore(self, held: tuple[dict[str, torch.Tensor], dict]) -> None:
        tensors, history = held
        self.history = History(**history)
        parts = {"now": {}, "best": {}}
        states: dict[int, dict] = {}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            if part == "optimizer":
                number, rest = rest.split(".")
                states.setdefault(int(number), {})[rest] = tensor
            else:
                parts[part][rest] = tensor.to(self.model.device)
        self.modules.load_state_dict(parts["now"])
        self.best = parts["best"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})

    def result(self, texts) -> KVCompressor:
        """The best compressor."""
        self.modules.load_state_dict(self.best)
        compressor, tensors = self.compressor, dict(self.compressor.tensors)
        for layer_idx, module in self.modules.items():
            for name, tensor in module.tensors().items():
                held = tensors[f"layers.{layer_idx}.{name}"]
                tensors[f"layers.{layer_idx}.{name}"] = tensor.to(held.dtype)
        history = self.history
        note = {
            "settings": asdict(self.settings) | {"learning_rate": self.learning_rate},
            "windows": list(self.windows.shape),
            "held_out_kl": {"before": history.looks[0][1], "after": history.best_kl},
            "steps": history.best_step,
            "versions": {"torch": torch.__version__, "transformers": host_version()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        if isinstance(texts, Mapping):
            note["text"] = sources_of(texts)
        trained = KVCompressor(compressor.config | {"training": note}, tensors)
        trained.history = history
        return trained


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter of the model requires grad inside; as it was after."""
    required = [p for p in model.parameters() if p.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@contextmanager
def _tensor_cores(model: PreTrainedModel) -> Iterator[None]:
    """Lets an NVIDIA GPU multiply float32 matrices in TF32 inside, which is several times faster.

    Searches are in exact integers that TF32 holds, and gradients have far more noise of their own.
    """
    before = torch.get_float32_matmul_precision()
    if model.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _memory(settings: TrainingSettings) -> Iterator[None]:
    """Says what to do where memory is short."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"`batch_size` must fit the device's memory, got {settings.batch_size} windows of {settings.window} "
            "tokens: lower it and raise `gradient_accumulation_steps` as much, set `gradient_checkpointing`, load the "
            "model in 16 bits, or lower `window`."
        ) from error
