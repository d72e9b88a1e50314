"""What all experiments' command lines share: one sentence for a user's error, progress bars, measurements."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from experiments.overrides import check_command, multirun_first
from experiments.tracking import trackers
from jquant.errors import InputError
from jquant.parallel.mesh import Devices
from jquant.parallel.processes import join
from jquant.progress import Progress as Report
from jquant.progress import showing

console = Console()


def run(main: Callable[[], None]) -> None:
    """Checks the command line, and runs an experiment's Hydra entry point under `one_sentence`."""
    # Hydra prints its own long messages about configs unless told to raise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with one_sentence():
        sys.argv[1:] = multirun_first(sys.argv[1:])  # Hydra's parser takes no flag between settings
        check_command(Path(sys.argv[0]).stem, sys.argv[1:])
        trackers()
        main()


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence: status 2 for an error that the user can mend, status 130 on Ctrl-C.

    Hydra prints every exception that leaves a job, so jobs use this inside too.
    """
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException) as wrong:
        Console(stderr=True).print(f"error: {_sentence(wrong)}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted: finished rows are kept; the same command resumes after them")
        sys.exit(130)


def _sentence(error: BaseException) -> str:
    # Hydra advises a + before an unknown name; with it, a misspelt setting would be added and ignored.
    leave_out = ("To append to your config", "See https://hydra.cc")
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(leave_out)]
    return " ".join(lines[:6]) if lines else type(error).__name__


def show(table: Table) -> None:
    """Prints a table whole: a line that is longer than the terminal goes on in the next one, and no figure is cut."""
    console.print(_Whole(table), crop=False)


def room() -> int | None:
    """The terminal's width in characters; None if the output is no terminal, and lines may have any length."""
    return console.width if console.is_terminal else None


def natural_width(table: Table) -> int:
    """The width of a table none of whose cells is cut or wrapped."""
    return console.measure(table, options=console.options.update_width(10_000)).maximum


class _Whole:
    """A table at its natural width, whatever the console's; rich would cut its cells."""

    def __init__(self, table: Table):
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self._table, options.update_width(natural_width(self._table)))


def progress_bars(row: str) -> AbstractContextManager[Report]:
    """Shows a row's progress (`jquant.progress`) on the console of the other messages."""
    return showing(not console.quiet, row, console)


def devices_of(settings: dict[str, Any]) -> Devices | None:
    """The mesh that the settings ask for, over the devices of all processes; None for one device.

    Raises:
      InputError: a number out of range, more devices than there are, or processes that can't meet.
    """
    _join(settings.get("hosts"))
    mesh = settings["mesh"]
    for axis in ("data", "model"):
        if type(mesh[axis]) is not int:
            raise InputError(f"mesh.{axis} takes a whole number from 1, not {mesh[axis]!r}.")
    devices = Devices(**mesh)
    return devices if mesh["data"] * mesh["model"] > 1 else None


def _join(hosts: Any) -> None:
    if hosts is None or jax.distributed.is_initialized():
        return
    if hosts != "auto" and not (isinstance(hosts, dict) and hosts.keys() == {"coordinator", "count", "index"}):
        raise InputError(f"hosts takes auto or {{coordinator:'host:port',count:2,index:0}}, not {hosts!r}.")
    join(**{} if hosts == "auto" else hosts)
    console.quiet = jax.process_index() > 0  # only process 0 prints


def reset_peak_rss() -> None:
    """Starts a new measurement of peak resident memory, where the system allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mb() -> float:
    """Peak resident memory in MB since the last reset, or since the process began if it can't be reset."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
