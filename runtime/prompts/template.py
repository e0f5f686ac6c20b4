"""Chat templates that a user gives, as text, by name or in a file: read, bounded, and checked before a model is
loaded for them.

Alone because it needs jinja2 only: a template that does not parse is found by the statement, not by a worker.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.checkpoints.folder import check_roots
from runtime.errors import UserError, did_you_mean
from runtime.prompts import names

FILE = "file:"
"""Begins a chat_template that stands in a file: ``file:/path/to/template.jinja``."""
SUFFIX = ".jinja"
MAX_TEMPLATE_BYTES = 1 << 20


def read_template(said: str) -> str:
    """The jinja text of the option chat_template: a name's, a file's, or itself. `auto` stays: it is the checkpoint's
    to decide (`find_style`).

    Raises:
        UserError: chat_template; checkpoint_outside_roots.
    """
    if said.lower() == names.AUTO:
        return names.AUTO
    text = _from_file(said.removeprefix(FILE)) if said.startswith(FILE) else names.named(said) or said
    if not text.strip():
        raise UserError(
            "chat_template is empty.", code="chat_template", hint="Leave it out, or give a jinja template."
        )
    if len(text.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
        raise _too_large()
    if "{" not in text:
        near = did_you_mean(text[:100], names.names())
        raise UserError(
            f'There is no chat template "{text[:100]}".',
            code="chat_template",
            hint=(f'Did you mean "{near}"? ' if near else "")
            + f"Known: {names.AUTO}, {', '.join(names.names())}; or give a jinja text, or {FILE}path{SUFFIX}.",
        )
    check_template(text)
    return text


def check_template(text: str) -> None:
    """Refuse a text that is no jinja template.

    Raises:
        UserError: chat_template, with the line.
    """
    import jinja2

    try:
        environment().parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"chat_template does not parse, line {error.lineno}: {error.message}.",
            code="chat_template",
            hint=f"It is a jinja template over `messages`; a file is given as {FILE}path{SUFFIX}.",
        ) from None
    except RecursionError:
        raise UserError(
            "chat_template is nested too deeply.", code="chat_template", hint="Write it with fewer levels."
        ) from None


def environment() -> Any:
    """jinja's immutable sandbox with what transformers adds to the language of templates."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}``: marks what the assistant said, and changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja's way

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])


def _from_file(path: str) -> str:
    file = Path(os.path.realpath(os.path.expanduser(path)))
    if "\0" in path or file.suffix != SUFFIX:
        raise UserError(
            f'chat_template: "{path}" is no {SUFFIX} file.', code="chat_template", hint=f"Write {FILE}path{SUFFIX}."
        )
    check_roots(file)
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise _too_large()
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8 text"
        raise UserError(
            f'chat_template: "{file}" cannot be read: {why}.', code="chat_template", hint="Check the path."
        ) from None


def _too_large() -> UserError:
    return UserError(
        f"chat_template is larger than {MAX_TEMPLATE_BYTES >> 20} MB.", code="chat_template", hint="Shorten it."
    )
