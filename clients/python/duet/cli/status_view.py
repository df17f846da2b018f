"""The view of `duet status` on a terminal."""

import datetime
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from duet.cli.status_history import History, Rates, Snapshot
from duet.errors import DuetError
from protos.duet.inference.v1 import inference_pb2 as pb

_BAR_CELLS = 40
_LEVELS = "▁▂▃▄▅▆▇█"


def view(address: str, snapshot: Snapshot, rates: Rates, history: History, lost: DuetError | None) -> RenderableType:
    """One picture; `lost` is why it is not of now."""
    server, model, load = snapshot.server, snapshot.model, snapshot.server.load
    up = datetime.timedelta(seconds=int(load.uptime_seconds))
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    rows.add_row("model", f"{model.name}, {model.architecture}, {model.dtype}" if model else "none yet")
    device = server.device or "none yet"
    rows.add_row("executor", device if server.ready or not server.device else f"{device}, not connected")
    rows.add_row("", f"epoch {server.epoch}, {load.executor_losses_total} lost, up {up}, {server.queue_order}")
    rows.add_row("requests", _bar((load.running_requests, "green"), total=load.max_running_requests))
    rows.add_row("", f"{load.running_requests} running of {load.max_running_requests}, {load.waiting_requests} waiting")
    rows.add_row("", f"{load.finished_requests_total} finished, {load.preemptions_total} preemptions")
    rows.add_row("", f"{load.detached_requests} detached, {load.quarantined_requests} quarantined")
    used = load.used_blocks, "red" if load.used_blocks > 0.9 * load.total_blocks else "green"
    rows.add_row("KV blocks", _bar(used, (load.cached_blocks, "blue"), total=load.total_blocks))
    free = load.total_blocks - load.used_blocks - load.cached_blocks
    rows.add_row("", f"{load.used_blocks} used, {load.cached_blocks} cached, {free} free")
    rows.add_row("", f"of {load.total_blocks} x {load.block_size} tokens")
    overall = load.cached_tokens_total / max(load.prompt_tokens_total, 1)
    now = "no prompt" if rates.hit_rate is None else f"{rates.hit_rate:.1%}"
    rows.add_row("prefix hits", f"{now} now, {overall:.1%} of all prompt tokens")
    rows.add_row("decode", _course([one.decode_tokens for one in history.course]))
    rows.add_row("", f"{rates.decode_tokens:.0f} tokens/s, {rates.steps:.0f} steps/s")
    rows.add_row("prefill", _course([one.prefill_tokens for one in history.course]))
    rows.add_row("", f"{rates.prefill_tokens:.0f} tokens/s")
    rows.add_row("self-checks", Text(self_checks(load), style="red" if load.idle_check_failures_total else ""))
    title = f"Duet {server.version} at {address}" + ", draining" * server.draining
    if lost is None:
        style = "green" if server.ready and not server.draining else "yellow"
        return Panel(rows, title=title, border_style=style, expand=False)
    trouble = Text(f"{lost.message}: trying again", style="red")
    return Panel(Group(rows, trouble), title=title, border_style="red", expand=False)


def self_checks(load: pb.Load) -> str:
    """How the core's checks of itself ended, which it makes where it has nothing to do."""
    failed = load.idle_check_failures_total
    return f"{load.idle_checks_total} passed" + (f", {failed} FAILED: see the server's log" if failed else "")


def _bar(*parts: tuple[int, str], total: int) -> Text:
    """Counts and their colours, as shares of `total`; what is there at all fills a cell."""
    text = Text()
    for count, style in parts:
        text.append("█" * min(-(-count * _BAR_CELLS // max(total, 1)), _BAR_CELLS - len(text)), style)
    return text.append("░" * (_BAR_CELLS - len(text)), "dim")


def _course(values: Sequence[float]) -> Text:
    """A column for each value, oldest first, the largest one the highest."""
    most = max(values, default=0.0) or 1.0
    return Text("".join(_LEVELS[round(value / most * (len(_LEVELS) - 1))] for value in values), style="cyan")
