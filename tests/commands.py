"""Runs an experiment's command as a user would."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

from experiments import command_line

ROOT = Path(__file__).parents[1]


def run_in_process_of_its_own(script: str, *arguments: str, **options) -> CompletedProcess:
    """Status, standard output and error of `python -m experiments.<script> <arguments>`."""
    command = [sys.executable, "-m", f"experiments.{script}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def run_here(script: str, *arguments: str) -> CompletedProcess:
    """The same in this process, which has imported everything and compiled most of it."""
    module = importlib.import_module(f"experiments.{script}")
    command, status = [f"{script}.py", *arguments], 0
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ),
        redirect_stdout(io.StringIO()) as output,
        redirect_stderr(io.StringIO()) as errors,
    ):
        try:
            command_line.run(module.main)
        except SystemExit as ended:
            status = ended.code
    return CompletedProcess(command, status, output.getvalue(), errors.getvalue())
