"""The address that clients connect to."""

import socket


class PortUnavailable(Exception):
    """The listening address cannot be had; the message is one sentence."""


def check_address(address: str) -> None:
    """Try the address alone, since gRPC says what is wrong with it only in a log of its own.

    Raises: PortUnavailable.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except ValueError as error:
        raise PortUnavailable(f"cannot listen on {address}: it is not of the form host:port") from error
    except OSError as error:
        raise PortUnavailable(f"cannot listen on {address}: {error.strerror}") from error
