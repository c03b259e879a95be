"""What a command is about: the arguments that a factory `package.module:factory` returns."""

import importlib
import traceback
from collections.abc import Mapping
from typing import Any

CHECKED = ("losses", "params", "batch")
MAY_BE_CHECKED = ("reducers", "has_aux", "options")
SCORED = ("losses", "params", "data", "reducers")
MAY_BE_SCORED = (
    *("batch_size", "collate", "ids", "length", "part", "dtype", "origin", "has_aux", "options", "plan", "texts"),
)


class UsageError(Exception):
    """The command cannot be run as it was given."""


def load(
    target: str, required: tuple[str, ...] = CHECKED, optional: tuple[str, ...] = MAY_BE_CHECKED
) -> dict[str, Any]:
    """The arguments that the factory `package.module:factory` returns, by name.

    Raises:
        UsageError: there is no such module or function, it fails, or it returns something else.
    """
    return named(called(target), target, required, optional)


def called(target: str) -> Any:
    """What the factory `package.module:factory` returns.

    Raises:
        UsageError: there is no such module or function, or it fails.
    """
    factory = function(target)
    try:
        return factory()
    except UsageError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"{target}() raises {type(error).__name__}: {error}") from error


def function(target: str) -> Any:
    """The function `package.module:name`.

    Raises:
        UsageError: there is no such module or function.
    """
    module_name, colon, path = target.partition(":")
    if not (colon and module_name and path):
        raise UsageError(f"the target must be package.module:factory, found {target!r}.")
    found = _imported(module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            raise UsageError(f"{module_name} has no {path!r}: give the name of a function that takes no arguments.")
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(f"{target} is no function but of type {type(found).__name__}.")
    return found


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {error.name!r} in the current folder or where this Python looks."
            ) from error
        traceback.print_exc()
        raise UsageError(f"importing {name} raises {type(error).__name__}: {error}") from error
    except Exception as error:
        traceback.print_exc()
        raise UsageError(f"importing {name} raises {type(error).__name__}: {error}") from error


def named(returned: Any, target: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """What a factory returned, by name.

    Raises:
        UsageError: something is missing, or unknown.
    """
    wanted = f"{', '.join(required[:-1])} and {required[-1]}"
    fields = returned._asdict() if isinstance(returned, tuple) and hasattr(returned, "_asdict") else returned
    if isinstance(fields, Mapping):
        missing = [name for name in required if name not in fields]
        unknown = [name for name in fields if name not in required + optional]
        if missing or unknown:
            raise UsageError(
                f"{target}() must return {wanted}, and may return {', '.join(optional)}; "
                f"missing {missing}, unknown {unknown}."
            )
        return dict(fields)
    if not isinstance(fields, tuple) or len(fields) != len(required):
        size = f" of {len(fields)}" if isinstance(fields, tuple) else ""
        raise UsageError(
            f"{target}() must return ({', '.join(required)}) or a dict of these, found {type(fields).__name__}{size}."
        )
    return dict(zip(required, fields, strict=True))
