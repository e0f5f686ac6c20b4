"""The YAML file of an import: which checkpoints, and what is said of them.

Alone because it is a form with fixed keys, in which every mistake is told with its line:

    checkpoints:                       required
      - model_name: …                  required
        checkpoint_path: …             required: a folder, a URL, or a repository of the hub with its revision
        revision, publisher, description, param_count (billions), model_arch, seq_length, vocab_size, app_id
    composite_model: model_name, model_list (both required), description, rdu_required
    project:         project_name (required), project_description
    endpoint:        endpoint_name (required), endpoint_description, endpoint_instances, hyperparams
    sambastudio:     snapi_path, rdu_arch
    model_checkpoint: model_name (required), model_version

Only `checkpoints` is acted upon here; the others say how the models are served, and are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from runtime.checkpoints.folder import check_roots
from runtime.errors import Place, UserError, did_you_mean

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One of `checkpoints`.

    Attributes:
        expected: what the checkpoint must be: model_arch, seq_length, vocab_size, param_count in billions.
        about: publisher and description.
    """

    name: str
    path: str
    revision: str = ""
    expected: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImportConfig:
    """What the file says.

    Attributes:
        others: the sections beside `checkpoints` that it has.
        members: names in composite_model.model_list that are none of the checkpoints here, with their places.
    """

    checkpoints: tuple[Entry, ...]
    others: tuple[str, ...] = ()
    members: tuple[tuple[str, Place], ...] = ()


# Keys of each section with the types of their values; a key with ! is required.
_TEXT, _WORD, _NUMBER = (str,), (str, int, float), (int, float)
_CHECKPOINT: Mapping[str, tuple[type, ...]] = {
    "model_name!": _TEXT,
    "checkpoint_path!": _TEXT,
    "revision": _WORD,
    "publisher": _TEXT,
    "description": _TEXT,
    "param_count": _NUMBER,
    "model_arch": _TEXT,
    "seq_length": (int,),
    "vocab_size": (int,),
    "app_id": _WORD,
}
_EXPECTED: tuple[str, ...] = ("model_arch", "seq_length", "vocab_size", "param_count")
_ABOUT: tuple[str, ...] = ("publisher", "description")
_SECTIONS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "composite_model": {"model_name!": _TEXT, "model_list!": (list,), "description": _TEXT, "rdu_required": (bool,)},
    "project": {"project_name!": _TEXT, "project_description": _TEXT},
    "endpoint": {
        "endpoint_name!": _TEXT,
        "endpoint_description": _TEXT,
        "endpoint_instances": (int,),
        "hyperparams": (dict,),
    },
    "sambastudio": {"snapi_path": _TEXT, "rdu_arch": _TEXT},
    "model_checkpoint": {"model_name!": _TEXT, "model_version": _WORD},
}
_TOP: Mapping[str, tuple[type, ...]] = {"checkpoints!": (list,), **dict.fromkeys(_SECTIONS, (dict,))}
_SAID = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a section with keys",
}


def read_config(path: str) -> ImportConfig:
    """Read the file and check its form.

    Raises:
        UserError: import_config, with the place in the file; checkpoint_outside_roots.
    """
    return _Reader(path).read()


class _Reader:
    """One file: its text for the places of errors, and its nodes."""

    def __init__(self, path: str) -> None:
        self._path = path
        file = Path(path).expanduser()
        check_roots(file.resolve())
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise UserError(
                    f'"{path}" is larger than 1 MB.', code="import_config", hint="Give the YAML file of an import."
                )
            self._text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            raise UserError(
                f'The config "{path}" cannot be read: {why}.', code="import_config", hint="Check the path."
            ) from None
        self._lines = self._text.splitlines()

    def read(self) -> ImportConfig:
        """Everything the file says."""
        top = self._section(self._root(), _TOP, "The file")
        entries: list[Entry] = []
        for node in top["checkpoints"].value:
            entry = self._entry(node)
            if any(entry.name == other.name for other in entries):
                self._fail(node, f'Two checkpoints are called "{entry.name}".', "Give each a model_name of its own.")
            entries.append(entry)
        if not entries:
            self._fail(top["checkpoints"], "checkpoints is empty.", "List one: - model_name: …, checkpoint_path: ….")
        members: list[tuple[str, Place]] = []
        for name, node in top.items():
            if name in _SECTIONS:
                said = self._section(node, _SECTIONS[name], name)
                members += self._members(said.get("model_list"), {entry.name for entry in entries})
        return ImportConfig(tuple(entries), tuple(name for name in top if name in _SECTIONS), tuple(members))

    def _entry(self, node: Any) -> Entry:
        nodes = self._section(node, _CHECKPOINT, "The checkpoint")
        said = {key: self._value(found) for key, found in nodes.items()}
        expected = {key: said[key] for key in _EXPECTED if key in said}
        about = {key: said[key] for key in _ABOUT if key in said}
        return Entry(said["model_name"], said["checkpoint_path"], str(said.get("revision", "")), expected, about)

    def _members(self, node: Any, known: set[str]) -> Iterator[tuple[str, Place]]:
        for item in node.value if node else ():
            name = self._value(item)
            if not isinstance(name, str):
                self._fail(item, "model_list holds something that is no name.", "List names of models.")
            if name not in known:
                yield name, self._place(item)

    def _section(self, node: Any, keys: Mapping[str, Sequence[type]], what: str) -> dict[str, Any]:
        """The values of a section by their keys, each known, once there and of its type."""
        types = {key.rstrip("!"): value for key, value in keys.items()}
        if node.id != "mapping":
            self._fail(node, f"{what} has no keys.", f"Keys: {', '.join(types)}.")
        found: dict[str, Any] = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            if key not in types:
                near = did_you_mean(key, types)
                hint = f'Did you mean "{near}"?' if near else f"Keys: {', '.join(types)}."
                self._fail(key_node, f'{what} has no key "{key[:80]}".', hint)
            if key in found:
                self._fail(key_node, f'"{key}" is there twice.', "Keep one of them.")
            if not self._is_empty(value):
                self._require_type(value, key, types[key])
                found[key] = value
        for key in keys:
            if key.endswith("!") and key[:-1] not in found:
                self._fail(node, f'{what} lacks "{key[:-1]}".', f'Add "{key[:-1]}: …".')
        return found

    def _require_type(self, node: Any, key: str, types: Sequence[type]) -> None:
        shape: Mapping[str, Callable[[], Any]] = {"mapping": dict, "sequence": list}
        value = shape[node.id]() if node.id in shape else self._value(node)
        if not isinstance(value, tuple(types)) or (isinstance(value, bool) and bool not in types):
            self._fail(node, f"{key} is not {_SAID[types[0]]}.", f'Write "{key}: …" with {_SAID[types[0]]}.')

    def _is_empty(self, node: Any) -> bool:
        """A key without a value says nothing."""
        return node.id == "scalar" and self._value(node) in (None, "")

    def _value(self, node: Any) -> Any:
        import yaml

        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError):
            return self._fail(node, "The value cannot be read.", "Put it in quotes.")

    def _root(self) -> Any:
        import yaml

        try:
            root = yaml.compose(self._text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = self._place_at(mark.line, mark.column) if mark else None
            problem = getattr(error, "problem", None) or "it cannot be parsed"
            raise UserError(
                f'"{self._path}" is no YAML: {problem}.', code="import_config", hint="Check the line.", place=place
            ) from None
        if root is None:
            raise UserError(f'"{self._path}" is empty.', code="import_config", hint="List checkpoints in it.")
        return root

    def _place(self, node: Any) -> Place:
        return self._place_at(node.start_mark.line, node.start_mark.column)

    def _place_at(self, line: int, column: int) -> Place:
        return Place(line + 1, column + 1, self._lines[line] if line < len(self._lines) else "", self._path)

    def _fail(self, node: Any, message: str, hint: str) -> NoReturn:
        raise UserError(message, code="import_config", hint=hint, place=self._place(node))
