"""What the core tells of itself."""

from scheduler_service.core.request_pool import RequestPool
from scheduler_service.ipc import Load


def load_of(pool: RequestPool, uptime_s: float) -> Load:
    """A snapshot of queues, blocks and totals."""
    epoch, counters = pool.epoch, pool.counters
    return Load(
        waiting_requests=pool.num_waiting,
        running_requests=len(epoch.running) if epoch else 0,
        max_running_requests=epoch.limits.num_slots if epoch else 0,
        used_blocks=epoch.blocks.num_blocks - epoch.blocks.num_free_blocks if epoch else 0,
        cached_blocks=epoch.blocks.num_cached_free_blocks if epoch else 0,
        total_blocks=epoch.blocks.num_blocks if epoch else 0,
        block_size=epoch.blocks.block_size if epoch else 0,
        prompt_tokens_total=counters.prompt_tokens,
        cached_tokens_total=counters.cached_tokens,
        prefill_tokens_total=counters.prefill_tokens,
        output_tokens_total=counters.output_tokens,
        finished_requests_total=counters.finished_requests,
        preemptions_total=counters.preemptions,
        steps_total=counters.steps,
        uptime_seconds=uptime_s,
        detached_requests=sum(retained.expires_at is not None for retained in pool.retained.values()),
        quarantined_requests=len(pool.quarantine),
        idle_checks_total=counters.idle_checks,
        idle_check_failures_total=counters.idle_check_failures,
        executor_losses_total=counters.executor_losses,
    )
