"""Docstrings on the site: references such as ``:func:`memopt.plan``` become links, and ``::`` before code a colon."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([\w.]+)`")
CODE_FOLLOWS = re.compile(r"::$", flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Makes Markdown of the little reStructuredText that docstrings hold."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when everything is loaded, so that short names can be resolved where they are used."""
        self._visit(pkg)

    def _visit(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            text = ROLE.sub(lambda role: self._link(obj, role[1]), obj.docstring.value)
            obj.docstring.value = CODE_FOLLOWS.sub(":", text)
        for member in obj.members.values():
            if not member.is_alias:
                self._visit(member)  # type: ignore[arg-type]

    @staticmethod
    def _link(obj: griffe.Object, name: str) -> str:
        """A link where the name is on the site, and the name where it is not."""
        try:
            target = name if "." in name else obj.resolve(name)
        except griffe.NameResolutionError:
            target = name
        return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
