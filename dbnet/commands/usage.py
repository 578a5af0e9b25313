"""A command line that answers a wrong word in one sentence, as `core.registry` does for a configuration's keys; its process."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dbnet.comm import mpi
from dbnet.core.errors import nearest

# What argparse says, and what is said instead; whatever is not listed is passed on.
_WORDS = (
    (r"the following arguments are required: (.*)", r"'{prog}' needs \1"),
    (r"argument (.*): invalid int value: (.*)", r"\1: \2 is not a whole number"),
    (r"argument (.*): expected one argument", r"\1 needs a value"),
    (r"argument (.*): ignored explicit argument .*", r"\1 takes no value"),
)


def collect_seldom() -> None:
    """Have garbage looked for seldom, and not in the end: what is imported is none, and looking would take a fourth of a start."""
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)


def unread() -> int:
    """Whoever read, like head, has seen enough: have nothing flushed to it at the end; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class Parser(argparse.ArgumentParser):
    """A parser that ends with exit code 2 and one sentence.

    Parameters
    ----------
    arguments
        Adds this parser's arguments when they are first wanted; whatever they need is imported then.
    """

    def __init__(self, *words: Any, arguments: Callable[[Parser], None] | None = None, **options: Any) -> None:
        super().__init__(*words, **options)
        self._arguments = arguments

    def complete(self) -> Parser:
        """Take in the arguments, once; return this."""
        arguments, self._arguments = self._arguments, None
        if arguments is not None:
            arguments(self)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.complete()
        return super().parse_known_args(args, namespace)

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line; overrides may stand before and after options. Of several ranks only the first one complains."""
        silent = contextlib.ExitStack()
        if mpi.launched_rank() > 0:
            silent.enter_context(contextlib.redirect_stderr(io.StringIO()))
            silent.enter_context(contextlib.redirect_stdout(io.StringIO()))
        with silent:
            options, rest = self.parse_known_args(arguments)
            if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
                self.strangers(rest, [options.command, getattr(options, "kind", "")])
        if rest:
            options.overrides += rest
        # '--resume table.key=value' names no checkpoint.
        if "=" in (getattr(options, "resume", None) or "") and not Path(options.resume).exists():
            options.overrides.append(options.resume)
            options.resume = ""
        return options

    def error(self, message: str) -> NoReturn:
        for pattern, words in _WORDS:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                message = found.expand(words.replace("{prog}", self.prog))
        if commands := self.commands():
            message = f"{re.sub('(COMMAND|FORMAT)', lambda found: 'a ' + found[0].lower(), message)}: {', '.join(commands)}"
        self.complain(f"{message}; '{self.prog} --help' explains it")

    def complain(self, sentence: str) -> NoReturn:
        """Print a sentence and end."""
        self.exit(2, "dbnet: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence) + ".\n")

    def commands(self) -> dict[str, Parser]:
        """Return the parsers of the words that may come next."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices
        return {}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            known, what = list(action.choices), str(action.metavar).lower()
            self.complain(f"'{self.prog}' has no {what} '{value}'{nearest(value, known)}; there are {', '.join(known)}")
        super()._check_value(action, value)

    def strangers(self, words: Sequence[str], path: Sequence[str]) -> NoReturn:
        """End for the sake of words that the command under `path` does not know."""
        here: Parser = self
        for word in path:
            here = here.commands().get(word, here)
        options = [option for action in here._actions for option in action.option_strings if option != "--help"]
        word = next((word for word in words if word.startswith("-")), words[0])
        close = nearest(word.partition("=")[0], options) if word.startswith("-") else ""
        self.complain(f"'{here.prog}' does not take '{word}'{close}; '{here.prog} --help' shows what it takes")
