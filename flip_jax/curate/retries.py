"""How long to wait before a request is made again."""

from __future__ import annotations

import email.utils
import time


def retry_after(value: str) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 where it says nothing."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0
