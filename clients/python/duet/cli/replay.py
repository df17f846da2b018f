"""`duet replay`: the plans of a recording on an executor, and what is different."""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from duet.cli.exit_status import DONE, FAILED, CommandFailed
from duet.cli.replay_report import Report
from duet.recorded_session import RecordedSession, split_sessions
from duet.recording import InvalidRecording, read_recording
from duet.replay import ReplayFailed, ReplayRefused, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.description = (
        "Send the plans of a recording, session by session, to an executor without a scheduler, and compare what is "
        "sampled with what was. The exit status is 1 where a token differs."
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="what `duet record` wrote")
    parser.add_argument(
        "--executor", default="127.0.0.1:50052", metavar="HOST:PORT", help="of the executor (%(default)s)"
    )
    parser.add_argument(
        "--pace",
        choices=("recorded", "fastest"),
        default="fastest",
        help="when a plan is sent: as long after the first one as it was, or as soon as the results are there that "
        "were there before it (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Replay every session; FAILED where a token differs."""
    reports: list[Report] = []
    try:
        recording = read_recording(args.file)
        sessions = split_sessions(recording.records)
        if recording.num_cut_bytes:
            print(
                f"duet: {args.file}: its last record is cut off: {recording.num_cut_bytes} bytes of it are left out",
                file=sys.stderr,
            )
        if not sessions:
            raise CommandFailed(f"{args.file}: nothing was recorded but openings of sessions")
        for session in sessions:
            reports.append(_replay(session, args))
            if not args.json:
                print("\n".join(reports[-1].lines()), flush=True)
    except (InvalidRecording, ReplayRefused, ReplayFailed) as error:
        raise CommandFailed(str(error)) from None
    if args.json:
        print(json.dumps({"cut_bytes": recording.num_cut_bytes, "sessions": [one.as_json() for one in reports]}))
    return FAILED if any(report.comparison.num_differences for report in reports) else DONE


def _replay(session: RecordedSession, args: argparse.Namespace) -> Report:
    with tqdm(total=session.num_steps(), desc=f"session {session.number}", disable=None, leave=False) as bar:
        done = replay(
            session,
            args.executor,
            at_recorded_pace=args.pace == "recorded",
            on_progress=lambda progress: bar.update(progress[0] - bar.n),
        )
    return Report.of(session, done)
