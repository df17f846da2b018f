"""docs/deployment.md: names of flags, fields, log lines, services and extras."""

import dataclasses
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from duet.client import DEFAULT_ADDRESS
from executor_service.config import ExecutorConfig
from executor_service.server import SERVICE as EXECUTOR
from protos.duet.inference.v1 import inference_pb2 as pb
from scheduler_service.config import SchedulerConfig
from scheduler_service.frontend.service import SERVICE_NAME as SCHEDULER
from servicekit.supervisor import EXIT_GAVE_UP
from tests.docs.pages import page
from tests.e2e.system import PATIENCE_S, ROOT, System

PAGE = page("docs/deployment.md")


def section(title: str) -> str:
    return PAGE.text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_flags_belong_to_the_service_that_is_named() -> None:
    flags = {
        "scheduler": {field.name for field in dataclasses.fields(SchedulerConfig)},
        "executor": {field.name for field in dataclasses.fields(ExecutorConfig)},
    }
    rows = re.findall(r"^\| (`--.*`) \| (scheduler|executor) \|", section("Flags that matter"), re.MULTILINE)
    assert len(rows) > 8
    for names, service in rows:
        assert {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", names)} <= flags[service]


def test_every_flag_in_the_text_is_one() -> None:
    known = {field.name for config in (SchedulerConfig, ExecutorConfig) for field in dataclasses.fields(config)}
    others = {"json", "watch", "interval", "limit", "shm_size"}
    assert {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", PAGE.text)} <= known | others


def test_defaults_in_the_text_are_the_defaults() -> None:
    config = SchedulerConfig(model="")
    for name in ("max_waiting", "max_pause_s"):
        flag = name.replace("_", "-")
        assert f"**`--{flag}`** ({getattr(config, name):g})" in section("Limits")


def test_fields_to_monitor_are_fields_of_the_load() -> None:
    fields = {field.name for message in (pb.Load, pb.GetServerResponse) for field in message.DESCRIPTOR.fields}
    named = set(re.findall(r"`([a-z_]+)`", section("What to monitor")))
    assert named - {"duet"} <= fields
    assert {field.name for field in pb.Load.DESCRIPTOR.fields} - named == {"block_size", "uptime_seconds"} - named


def test_log_lines_are_logged() -> None:
    folders = ("scheduler_service", "executor_service", "servicekit")
    source = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    lines = re.findall(r"^\| `([^`]+)` \|", section("Logs"), re.MULTILINE)
    assert len(lines) > 6
    for line in lines:
        pattern = re.sub(r"\b[A-Z]+\b", "VALUE", line)
        pattern = re.escape(pattern).replace("VALUE", r"(%\w|\{[^{}]*\})")
        assert re.search(pattern, source), line


def test_probes_ask_for_services_that_answer() -> None:
    probes = re.findall(r"grpc: \{port: (\d+), service: ([\w.]+)\}", PAGE.text)
    assert probes == [("50051", SCHEDULER), ("50052", EXECUTOR)]
    assert SchedulerConfig(model="").listen.endswith(":50051")
    assert ExecutorConfig(model="").listen.endswith(":50052")


def test_extras_and_exit_status_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[(\w+)\]'", PAGE.text)) <= set(extras)
    assert f"exit status {EXIT_GAVE_UP}" in PAGE.text


def test_health_is_asked_for_as_shown(docs_server: System) -> None:
    (console,) = PAGE.consoles()
    buf = shlex.quote(str(Path(sys.executable).with_name("buf")))
    command = console.command.replace(".venv/bin/buf", buf).replace(DEFAULT_ADDRESS, docs_server.address)
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, encoding="utf-8", timeout=PATIENCE_S, check=True)
    assert done.stdout == console.output
