"""Runs `deltakv` in this process."""

from typer.testing import CliRunner

from deltakv_hf.cli.console import console
from deltakv_hf.cli.main import app

# tables are fitted to the console, which takes the width of the terminal when it is imported: pytest-xdist says 80
console.width = 120


def run(*arguments):
    """The result of a command."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_refused(result, *words):
    """One line on stderr that holds `words`, and code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for word in words:
        assert str(word) in result.stderr
