"""The source files that a model needs, gathered so that they run without this project."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from data import storage
from data.errors import UserError

_PACKAGE = "trainer.models"
_ROOMS = ("cluster", "deploy", "trainer", "eval", "data")


def write_sources(family: str, folder: Path) -> None:
    """Writes a family's file in trainer/models, and those that it imports, to a folder that can be a package anywhere.

    Imports of one another become relative ones, so that the folder's name there does not matter.

    Raises:
        UserError: there is no such family, or a file imports from another room.
    """
    waiting, done = [family], set()
    while waiting:
        name = waiting.pop()
        found = importlib.util.find_spec(f"{_PACKAGE}.{name}")
        if found is None or found.origin is None:
            raise UserError(f"unknown model family {name!r}: use the version of manymodes that trained it")
        text = _relative(Path(found.origin).read_text())
        tree = ast.parse(text)
        foreign = sorted(_imported(tree) & set(_ROOMS))
        if foreign:
            raise UserError(f"{found.origin} imports {foreign[0]}: a model's files may import torch and each other")
        storage.write_text(str(folder / f"{name}.py"), text)
        done.add(name)
        waiting += sorted(_siblings(tree) - done - set(waiting))


def _relative(text: str) -> str:
    text = re.sub(rf"^(\s*)from {re.escape(_PACKAGE)}\.", r"\1from .", text, flags=re.MULTILINE)
    return re.sub(rf"^(\s*)from {re.escape(_PACKAGE)} import", r"\1from . import", text, flags=re.MULTILINE)


def _siblings(tree: ast.Module) -> set[str]:
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    named = {node.module.partition(".")[0] for node in imports if node.module}
    return named | {alias.name for node in imports if not node.module for alias in node.names}


def _imported(tree: ast.Module) -> set[str]:
    """The top-level packages that are imported anywhere in a file."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.partition(".")[0] for name in names}
