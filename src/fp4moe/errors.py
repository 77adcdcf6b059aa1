"""The errors that fp4moe raises on purpose.

Every message reads `<function>: <argument> must <rule>; got <value>. <what to do>.`
"""

from collections.abc import Iterable


class Fp4MoeError(Exception):
    """Base of every error that fp4moe raises on purpose."""


class ShapeError(Fp4MoeError, ValueError):
    """A shape, dtype, device or value of an argument does not fit."""


class UnsupportedError(Fp4MoeError, NotImplementedError):
    """The request is well formed, but nothing here can serve it; lists the reasons."""


class CheckpointError(Fp4MoeError, ValueError):
    """A checkpoint is incomplete, damaged, unsafe or in an unknown format."""


def check_choice(name: str, value: object, known: Iterable[object], *, caller: str) -> None:
    """Raise UnsupportedError unless the value of that argument is a known one."""
    known = tuple(known)
    if value not in known:
        raise UnsupportedError(
            f"{caller}: {name} must be one of {', '.join(map(str, known))}; got {value!r}. Pass "
            "one of these."
        )
