"""The command `minirl`, called in this process."""

import pytest
from minirl.cli import main


def fails(capsys, *arguments) -> str:
    """The one message of the command, in one line; the command must end with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())
