"""The command `minirl`, called in this process."""

import pytest
from minirl.cli import main


def fails(capsys, *arguments) -> str:
    """What the command says as it ends with status 2, in one line; it must be one message."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert "Traceback" not in error
    return " ".join(error.replace("│", " ").split())
