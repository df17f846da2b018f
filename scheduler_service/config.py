"""Settings of the scheduler service."""

import dataclasses

from servicekit.settings import setting


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Every flag of `python -m scheduler_service`."""

    model: str = setting(dataclasses.MISSING, "directory with config.json and tokenizer.json")
    model_name: str | None = setting(None, "name that clients may ask for (default: the directory's name)")
    listen: str = setting("127.0.0.1:50051", "address for clients, host:port")
    num_frontends: int | None = setting(
        None, "front end processes that share the port (default: one for every four cores, four at most)", least=1
    )
    executor: str = setting(
        "127.0.0.1:50052",
        "address of the executor service, host:port; of several, parted by commas, the first that serves",
    )
    admin_secret_file: str | None = setting(
        None, "file with the secret that administration takes (default: none, and it is open to the loopback)"
    )
    core_socket: str | None = setting(None, "path of the core's Unix socket (default: a temporary one)")
    queue_order: str = setting(
        "fcfs",
        "order of admission (preemption is last come, first out)",
        choices=("fcfs", "priority", "shortest-remaining"),
    )
    max_waiting: int = setting(4096, "requests in the waiting queue before new ones are refused", least=1)
    max_inflight_steps: int = setting(2, "plans sent ahead of their results", least=1)
    max_decode_stall_ms: int = setting(
        400, "how long waiting prompts may hold up running streams, milliseconds", least=0
    )
    step_timeout_s: float = setting(
        60.0, "seconds that a step may take, beside twenty times what it should, before the executor hangs", least=1
    )
    max_pause_s: float = setting(60.0, "how long a request waits for an executor before UNAVAILABLE, seconds", least=0)
    drain_s: float = setting(30.0, "seconds that streams may go on after SIGTERM", least=0)
    hang_timeout_s: float = setting(
        10.0, "seconds of silence after which a process is taken for hung, and killed", least=0.5
    )
