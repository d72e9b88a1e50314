"""New rows, sent to experiment trackers as well: TensorBoard, Weights & Biases, MLflow.

    JQUANT_TRACKING=tensorboard,wandb python -m experiments.perplexity_table

Each row is a run of its own, with the row's numbers as figures and its settings as configuration.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jquant.errors import InputError

Row = dict[str, Any]


def trackers() -> list[str]:
    """The trackers that JQUANT_TRACKING names.

    Raises:
      InputError: one that is not known or not installed.
    """
    names = [name for name in os.environ.get("JQUANT_TRACKING", "").replace(" ", "").split(",") if name]
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"JQUANT_TRACKING={name} is no tracker; there are {', '.join(TRACKERS)}.")
        package, _ = TRACKERS[name]
        if not find_spec(package):
            raise InputError(f"JQUANT_TRACKING={name} needs the package {package}: pip install {package}.")
    return names


def track(folder: Path, rows: Sequence[Row]) -> None:
    """Sends rows, which are kept in the folder already, to the trackers that JQUANT_TRACKING names.

    Raises:
      InputError: a tracker did not take them.
    """
    for name in trackers():
        _, send = TRACKERS[name]
        try:
            for row in rows:
                title = f"{folder.name} {row['method']} {row['fingerprint'][:6]}"
                figures = {key: value for key, value in flat(row) if type(value) in (int, float)}
                settings = dict(flat(row.get("config", {}))) | dict(flat(row.get("protocol", {}), "protocol."))
                send(folder, title, figures, settings)
        except Exception as wrong:
            reason = (str(wrong).splitlines() or [type(wrong).__name__])[0]
            raise InputError(f"The rows are kept in {folder}, but {name} did not take them: {reason}") from wrong


def flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """A JSON object's numbers and texts by their dotted names; lists and the row's own settings are left out."""
    for key, part in value.items():
        if isinstance(part, Mapping) and (above or key not in ("config", "protocol", "packages")):
            yield from flat(part, f"{above}{key}.")
        elif isinstance(part, str | int | float):
            yield above + key, part


def _tensorboard(folder: Path, title: str, figures: dict[str, float], settings: dict[str, Any]) -> None:
    with import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_hparams(settings, figures, name=title)


def _wandb(folder: Path, title: str, figures: dict[str, float], settings: dict[str, Any]) -> None:
    run = import_module("wandb").init(name=title, dir=str(folder), config=settings, reinit="create_new")
    run.log(figures)
    run.finish()


def _mlflow(_: Path, title: str, figures: dict[str, float], settings: dict[str, Any]) -> None:
    mlflow = import_module("mlflow")
    with mlflow.start_run(run_name=title):
        mlflow.log_params(settings)
        mlflow.log_metrics(figures)


TRACKERS: dict[str, tuple[str, Callable[[Path, str, dict[str, float], dict[str, Any]], None]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
}
