"""`python -m tests.chaos`: a disturbed run, then RLlib's scenario; prints tables, or one JSON object with --json."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile

from rich.console import Console

from tests.chaos.actor_manager import ACTORS, ROUNDS, rounds
from tests.chaos.disturbed_run import disturb, three_nodes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--faults", type=int, default=68)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Ray tells of every death on stdout, which is to hold the result alone.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    console = Console(stderr=True, soft_wrap=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {
            "HOME": home,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        os.environ.pop("RAY_ADDRESS", None)
        report = disturb(options.steps, options.faults, options.seed, console)
        with three_nodes():
            outcome = rounds(options.seed, console)
    if options.json:
        stdout.write(json.dumps({"chaos": dataclasses.asdict(report), "rllib": dataclasses.asdict(outcome)}) + "\n")
    else:
        result = Console(file=stdout, soft_wrap=True)
        for table in report.tables():
            result.print(table)
        result.print(
            f"RLlib's scenario: {outcome.good} of {ACTORS * ROUNDS} results, with {outcome.crashed} crashes and"
            f" {outcome.raised} errors; bits equal: {'yes' if outcome.equal_bits else 'NO'}"
        )
    stdout.close()
    good = report.equal_bits and not report.torn_loaded and not report.not_injected
    return 0 if good and outcome.equal_bits and outcome.good == ACTORS * ROUNDS else 1


if __name__ == "__main__":
    sys.exit(main())
