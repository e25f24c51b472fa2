"""What a user did wrong, said in a way that helps. The command line prints it and leaves with code 2."""


class UserError(Exception):
    """A mistake that the user can fix: the message names the file or key, what is wrong, and the remedy.

    Raised before anything expensive starts. Never raised for a bug of ours: those keep their traceback.
    """


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived and the run was left resumable. `code` is the exit code to leave with.

    Like KeyboardInterrupt it is no Exception: what catches whatever a decoder raises must let it through.
    """

    def __init__(self, code: int) -> None:
        super().__init__("stopped; the same command goes on from here")
        self.code = code
