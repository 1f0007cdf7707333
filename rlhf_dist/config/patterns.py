"""Regular expressions in a config."""

from __future__ import annotations

import re
import warnings


def pattern_problem(pattern: str) -> str:
    """Why Python cannot compile the pattern, with the position where it knows one; empty where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may change in a later Python
            re.compile(pattern, re.DOTALL)
    except re.error as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    except (OverflowError, ValueError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""
