"""The text of `--help`: every option once, grouped by topic, in at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from rtservice.config.render import by_topic
from rtservice.config.schema import Setting
from rtservice.config.values import FLAG, as_text

# The settings that most users need, listed first.
_MOST_USED = ("port", "listen", "protocol", "workers", "status")

_WIDEST, _NARROWEST = 80, 50

# The column in which help begins. A longer option has its help on the next line.
_HELP_COLUMN = 26

# A space at which no line is wrapped.
_HARD_SPACE = "\xa0"


@dataclass(frozen=True)
class Entry:
    """An option of the command line: its names with the metavar, such as `-p, --port PORT`, and its help."""

    option: str
    help: str


_INTRODUCTION = """
Serve a Twisted protocol over TCP, TLS and UNIX sockets. The default protocol greets each client and echoes every byte.

Examples:
  twistd -n rtservice --port 8080
  twistd -n rtservice --listen ssl:8443:privateKey=key.pem:certKey=cert.pem
  twistd -n rtservice --protocol mymodule:MyFactory --workers auto
"""

_CLOSING = """
Every setting can also be given as an environment variable (RTSERVICE_MAX_CONNECTIONS=100) or in the file of --config
(max-connections=100). The command line takes precedence over the environment, and the environment over the file.

Options of twistd stand before the word rtservice, such as -n to stay in the foreground; see twistd --help.
"""


def usage_text(settings: Iterable[Setting], others: Iterable[Entry], width: int) -> str:
    """Return the help of `settings` and of `others`, the options that are no settings.

    Lines have at most `width` columns, but at least 50 and at most 80. Examples and words that are longer than a line
    are not broken.
    """
    width = max(_NARROWEST, min(width, _WIDEST))
    known = list(settings)
    most_used = [setting for name in _MOST_USED for setting in known if setting.name == name]
    by_topics = by_topic(setting for setting in known if setting not in most_used)
    sections = {
        "Most used": list(map(_entry, most_used)),
        "Configuration and help": list(others),
        **{topic: list(map(_entry, of_topic)) for topic, of_topic in by_topics.items()},
    }
    options = (
        f"{title}:\n" + "".join(_lines(entry, width) for entry in entries) + "\n" for title, entries in sections.items()
    )
    return f"\n{_paragraphs(_INTRODUCTION, width)}{''.join(options)}{_paragraphs(_CLOSING, width)}".rstrip("\n")


def _entry(setting: Setting) -> Entry:
    short = f"-{setting.short}, " if setting.short else ""
    metavar = f" {setting.metavar}" if setting.metavar else ""
    # The default of a flag is always off.
    default = "" if setting.kind is FLAG else as_text(setting.default)
    notes = " [repeatable]" if setting.repeatable else ""
    if default:
        notes += " " + f"[default: {default}]".replace(" ", _HARD_SPACE)
    return Entry(f"{short}--{setting.name}{metavar}", setting.help.replace("`", "") + notes)


def _lines(entry: Entry, width: int) -> str:
    # The long names are aligned: those without a short name begin where those with one do.
    option = f"      {entry.option}" if entry.option.startswith("--") else f"  {entry.option}"
    begin = f"{option}  ".ljust(_HELP_COLUMN)
    indent = " " * _HELP_COLUMN
    if len(begin) > _HELP_COLUMN:
        return f"{option}\n{_wrapped(entry.help, width, indent, indent)}\n"
    return f"{_wrapped(entry.help, width, begin, indent)}\n"


def _paragraphs(text: str, width: int) -> str:
    """Wrap each paragraph, except one with indented lines, such as examples. An empty line follows each."""
    paragraphs = text.strip("\n").split("\n\n")
    wrapped = [part if "\n  " in part else _wrapped(" ".join(part.split()), width) for part in paragraphs]
    return "".join(f"{part}\n\n" for part in wrapped)


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    filled = textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace(_HARD_SPACE, " ")
