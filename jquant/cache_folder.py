"""Where downloads and all that is computed once are kept."""

import os
from pathlib import Path

import platformdirs

from jquant.errors import InputError


def cache_dir() -> Path:
    """The folder of downloads; it need not exist yet.

    Returns:
        `$JQUANT_CACHE` if set, else `jquant` in the platform's cache folder for this user.

    Raises:
        InputError: the user has no home folder and `JQUANT_CACHE` is not set.
    """
    try:
        if folder := os.environ.get("JQUANT_CACHE"):
            return Path(folder).expanduser().absolute()
        return platformdirs.user_cache_path("jquant", appauthor=False, opinion=False)
    except RuntimeError as error:
        raise InputError("there is no home folder to keep downloads in: set JQUANT_CACHE to another folder") from error
