"""Where a process stands among the ranks, in torchrun's terms: its environment variables, so that it may start them."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Placement:
    """A rank's place; the default is that of a process without others."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the ranks of its node: the GPU that is its own
    local_size: int = 1
    node: int = 0  # ranks of one node share memory
    master_addr: str = "127.0.0.1"  # by which all reach the node of rank 0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Placement":
        """The place that torchrun, or our own supervisor, has given to this process."""
        return cls(
            rank=int(environment.get("RANK", 0)),
            size=int(environment.get("WORLD_SIZE", 1)),
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_size=int(environment.get("LOCAL_WORLD_SIZE", 1)),
            node=int(environment.get("GROUP_RANK", 0)),
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
        )


def local_environments(size: int, port: int) -> list[dict[str, str]]:
    """What tells `size` processes of this machine that they are a group, and where they meet: a free port of it."""
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(size)
    ]
