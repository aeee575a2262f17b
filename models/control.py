"""The ids of the control tokens of tokenizer v15.  Every other file uses these names, never numbers."""

from __future__ import annotations

from enum import IntEnum


class Control(IntEnum):
    """`X_END` closes what `X` opens."""

    UNKNOWN = 0
    BOS = 1
    EOS = 2
    INST = 3
    INST_END = 4
    TOOLS = 5
    TOOLS_END = 6
    TOOL_RESULTS = 7
    TOOL_RESULTS_END = 8
    TOOL_CALLS = 9
    IMG = 10
    PAD = 11
    IMG_BREAK = 12
    IMG_END = 13
    SYSTEM = 17
    SYSTEM_END = 18
    ARGS = 32
    THINK = 34
    THINK_END = 35
    SETTINGS = 36
    SETTINGS_END = 37


N_NAMED = max(Control) + 1  # a vocabulary with fewer control tokens cannot carry the chat format
