"""The `sail` command, called within the test's own process."""

from click.testing import CliRunner, Result

from pipeline.cli import cli


def sail(*arguments: object, expect: int = 0) -> Result:
    """Call the command and see that it ends with an exit code."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == expect, result.stderr
    return result


def the_error_of(result: Result) -> str:
    """Return what a command that failed says; it is one line, and nothing is on stdout."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]
