"""What the exit status of a command says."""

DONE, FAILED, WRONG_USAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 130

EXIT_STATUSES = {
    DONE: "done",
    FAILED: "failed: a request was refused, a file cannot be read, a replay differs, a service gave up",
    WRONG_USAGE: "wrong usage",
    UNAVAILABLE: "no server there, or it is not ready, or its queue is full: trying again may help",
    INTERRUPTED: "interrupted by Ctrl-C",
}


class CommandFailed(Exception):
    """A command cannot go on, for a reason that lies neither in its flags nor in the server."""
