"""The one kind of error that a user can mend."""


class CxrError(Exception):
    """Bad input: one clear line that names the file, key or row at fault, and the mend.

    The command line prints the message without a traceback and exits with code 1.
    """
