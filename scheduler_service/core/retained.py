"""Requests that outlive their clients, and results that outlive their requests: what a client may resume."""

from scheduler_service.core.request import Kept, Request, RequestState

NO_CLIENT = -1  # the stream of a request whose client went away


class Retained:
    """All choices of a request with `detach_s`, those that have ended included."""

    def __init__(self, choices: list[Request], detach_s: float) -> None:
        self.choices = choices
        self.expires_at: float | None = None  # time.monotonic() seconds; None: a client waits for it
        self.asked_at = choices[0].arrival_time  # when the last client to have it came, time.monotonic() seconds
        self._detach_s = detach_s
        for request in choices:
            request.kept = request.kept or Kept()

    def replace(self, request: Request, other: Request) -> None:
        """Keep `other` instead of one of the choices."""
        self.choices[self.choices.index(request)] = other
        other.kept = other.kept or Kept()

    @property
    def has_ended(self) -> bool:
        """Whether every choice has."""
        return all(request.state is RequestState.FINISHED for request in self.choices)

    def see_client_leave(self, now: float) -> None:
        """From here on it lives for `detach_s`, unless a client comes back."""
        living = [request for request in self.choices if request.state is not RequestState.FINISHED]
        if living and all(request.stream == NO_CLIENT for request in living):
            self.expires_at = now + self._detach_s

    def see_client_come(self, now: float, asked_at: float) -> None:
        """A client waits for it again, or has been told its result."""
        self.asked_at = asked_at
        self.expires_at = now + self._detach_s if self.has_ended else None

    def see_end(self, now: float) -> None:
        """A choice ended."""
        if self.has_ended:
            self.expires_at = now + self._detach_s
