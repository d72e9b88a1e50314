"""Regular expressions that stand in files: a few characters of one can take for ever, so another process tries it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

from jquant.errors import InputError

SECONDS = 5.0  # those of real files take microseconds
# Reads [patterns, names] and writes the places of each pattern's names, or why a pattern is none.
_PROGRAM = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(pattern) for pattern in patterns]
except (re.error, RecursionError, OverflowError, MemoryError) as wrong:
    found = str(wrong) or type(wrong).__name__
else:
    found = [[i for i, name in enumerate(names) if pattern.fullmatch(name)] for pattern in compiled]
json.dump(found, sys.stdout)
"""


def full_matches(patterns: Sequence[str], names: Iterable[str]) -> Mapping[str, frozenset[str]]:
    """The names that each pattern of a file matches as a whole.

    Patterns without repetitions and alternatives are tried here, others in a process that is ended after SECONDS.

    Raises:
      InputError: a pattern that is no regular expression, or takes too long.
    """
    names = list(names)
    plain = [pattern for pattern in patterns if re.fullmatch(r"(\w|\.|\\\.)*", pattern)]
    found = {}
    for pattern in plain:
        compiled = re.compile(pattern)
        found[pattern] = frozenset(filter(compiled.fullmatch, names))
    others = [pattern for pattern in dict.fromkeys(patterns) if pattern not in found]
    if others:
        for pattern, places in zip(others, _elsewhere(others, names), strict=True):
            found[pattern] = frozenset(names[i] for i in places)
    return found


def _elsewhere(patterns: list[str], names: list[str]) -> list[list[int]]:
    """The places of each pattern's names, by a process of its own."""
    shown = f"{patterns[0][:50]!r}" + (f" and {len(patterns) - 1} more" if patterns[1:] else "")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([patterns, names]).encode(),
            capture_output=True,
            timeout=SECONDS,
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise InputError(f"the pattern {shown} takes longer than {SECONDS:g} s on names of weights") from None
    except ValueError:  # the process died: out of memory, e.g.
        raise InputError(f"the pattern {shown} can't be tried on names of weights") from None
    if isinstance(found, str):
        raise InputError(f"the pattern {shown} is no regular expression ({found[:100]})")
    return found
