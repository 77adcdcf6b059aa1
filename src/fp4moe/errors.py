"""The errors that fp4moe raises on purpose, and the two forms of their messages.

    a wrong argument   <function>: <argument> must <rule>; got <value>. <what to do>.
    a refusal          <function>: <what cannot be done>, because <reason>. <what to do>.

<function> is the one that the user called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn


class Fp4MoeError(Exception):
    """Base of every error that fp4moe raises on purpose."""


class ShapeError(Fp4MoeError, ValueError):
    """A shape, dtype, device or value of an argument does not fit."""


class UnsupportedError(Fp4MoeError, NotImplementedError):
    """The request is well formed, but nothing here can serve it; lists the reasons."""


class CheckpointError(Fp4MoeError, ValueError):
    """A checkpoint is incomplete, damaged, unsafe or in an unknown format."""


def must(
    argument: str,
    rule: str,
    got: object,
    advice: str,
    *,
    error: type[Fp4MoeError] = ShapeError,
    cause: BaseException | None = None,
) -> NoReturn:
    """Raise: an argument is wrong.

    Args:
        argument: "function: argument".
        rule: what it must be, such as "be a multiple of 16".
        got: the value, or a description of it.
        advice: what to do, a sentence.
        error: the class to raise. cause: the error behind it.
    """
    raise error(f"{argument} must {rule}; got {got}. {advice}") from cause


def refuse(
    function: str,
    what: str,
    reason: str,
    advice: str,
    *,
    error: type[Fp4MoeError] = UnsupportedError,
    cause: BaseException | None = None,
) -> NoReturn:
    """Raise: the arguments are well formed, but this cannot be done.

    Args:
        function: what the user called.
        what: what cannot be done, such as "the experts of X cannot be replaced".
        reason: why, without a full stop.
        advice: what to do, a sentence.
        error: the class to raise. cause: the error behind it.
    """
    raise error(f"{function}: {what}, because {reason}. {advice}") from cause


def check_choice(name: str, value: object, known: Iterable[object], *, caller: str) -> None:
    """Raise UnsupportedError unless the value of that argument is a known one."""
    known = tuple(known)
    if value not in known:
        rule = f"be one of {', '.join(map(str, known))}"
        must(f"{caller}: {name}", rule, repr(value), "Pass one of these.", error=UnsupportedError)
