"""The progress bar of every long job."""

from __future__ import annotations

from tqdm import tqdm as _tqdm


class tqdm(_tqdm):
    """tqdm's bar without the thread that tqdm starts with its first one, and never ends."""

    monitor_interval = 0
