"""`python -m duet.gateway_process`: the SMG gateway as a child of a supervisor, which hears when it is ready.

Arguments: the host:port at which it will listen, how many servers it must have found to be ready, and SMG's own flags.
"""

import json
import sys
import threading
import time
import urllib.request

from servicekit.lifeline import bind_to_parent, notify_ready

_POLL_S = 0.1
_TIMEOUT_S = 5.0


def main() -> None:
    """Run until SIGTERM, with SMG's own exit status."""
    bind_to_parent()
    address, num_servers, *flags = sys.argv[1:]
    threading.Thread(target=_notify_when_ready, args=(address, int(num_servers)), daemon=True).start()
    # Found in the gateway's environment alone; `duet gateway` has seen that it is there.
    from smg.launch_router import parse_router_args
    from smg.router import Router

    Router.from_args(parse_router_args(flags)).start()


def _notify_when_ready(address: str, num_servers: int) -> None:
    while _num_healthy_servers(address) < num_servers:
        time.sleep(_POLL_S)
    notify_ready()


def _num_healthy_servers(address: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on this way
    try:
        with opener.open(f"http://{address}/readiness", timeout=_TIMEOUT_S) as response:
            return json.load(response)["healthy_workers"]
    except OSError:  # it does not listen yet, or says that it is not ready
        return 0


if __name__ == "__main__":
    main()
