"""`metadist doctor`."""

import click

from metadist.commands.output import insecure_option, json_option, print_json, result_console


@click.command()
@click.option("--address", metavar="ADDR", help="The Ray cluster to look at, instead of $RAY_ADDRESS.")
@insecure_option
@json_option
def doctor(address: str | None, as_json: bool) -> None:
    """Check versions, Ray, devices and memory; say what to do about what is wrong."""
    from metadist.distributed.doctor import diagnose, table

    findings = diagnose(address)
    if as_json:
        print_json({"ok": all(f.status != "wrong" for f in findings), "findings": [f.as_dict() for f in findings]})
    else:
        result_console().print(table(findings))
    if any(finding.status == "wrong" for finding in findings):
        raise SystemExit(1)
