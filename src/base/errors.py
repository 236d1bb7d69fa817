"""Errors that are for the user: one line that says what was wrong, with which value, and what to do."""

import sys
from typing import NoReturn


class UserError(ValueError):
    """Something the user can put right: the message says what was wrong, with which value, and what to do.

    `command` is a script of this repository, with flags, that would put it right ("scripts/04_test_sidecar.py
    --retrain"). A script that ends with the error adds the flags that it was given itself (see `cli.run_main`).
    """

    def __init__(self, message: str, command: str | None = None):
        self.message, self.command = message, command
        super().__init__(self.with_flags([]))

    def with_flags(self, flags: list[str]) -> str:
        """The message, and the command with further flags behind it where there is one."""
        if self.command is None:
            return self.message
        return f"{self.message}: {' '.join(['python', self.command, *flags])}"


def fail(message: object, code: int = 2) -> NoReturn:
    """Print `message` as one line on stderr and exit with `code`: 2 for what was asked, 1 for the machine."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)
