"""What can be typed in a chat beside messages: commands, what they take, and what they leave."""

import pytest

from ms4.cli import chat_commands, repl
from ms4.cli.chat_commands import COMMANDS, PATH, completions


@pytest.mark.parametrize(
    ("before", "begun", "words"),
    [
        ("/ef", "/ef", ["/effort"]),
        ("/effort ", "", ["none", "low", "medium", "high"]),
        ("/effort m", "m", ["medium"]),
        ("/think s", "s", ["show"]),
        ("/file ~/a b", "~/a b", [PATH]),
        ("look at @/tmp/x", "/tmp/x", [PATH]),
        ("me@home", "", []),
        ("/new x", "x", []),
        ("hello /ef", "", []),
    ],
)
def test_what_tab_offers(before, begun, words):
    found = completions(before)
    assert (found[0], list(found[1])) == (begun, words)


def test_every_command_is_in_the_help_and_does_something():
    talk = repl.Talk.__new__(repl.Talk)
    talk.__init__(repl.ChatSettings(repl.Sampling()), *[None] * 6, False, None)
    assert [c.name for c in COMMANDS] == list(talk.commands)
    for command in COMMANDS:
        assert f"\n{command.name}" in "\n" + chat_commands.HELP and command.does
        assert completions(command.name)[1][command.name] == command.does
