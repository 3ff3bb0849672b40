"""What text there is to fetch: mixes, packages and sources, as configs/sources.toml lists them.

A package (some bytes with a version and a digest) and a source (a reading of some of its members) are two
things: the bundled slice and the fetched mix are two readings of the same packages, so the pins are written
once.
"""

import json
import os
import platform
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from nengram.config import shipped
from nengram.errors import DataError, nearest
from nengram.files import sha256_bytes
from nengram.text.render import RENDERERS

SOURCES = shipped("configs") / "sources.toml"
REGISTRIES = ("pypi", "debian", "local")
AS_IT_IS = "as_it_is"  # in place of a renderer: the one member is no text, and is written under its own name


@dataclass(frozen=True)
class Package:
    """One archive of one registry, as `[packages.NAME]` of sources.toml says."""

    name: str
    registry: str
    version: str = ""
    sha256: str = ""
    wheel: dict[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()
    limit_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """One file of entries, or one file as it is, as `[sources.NAME]` of sources.toml says; `label` is the source's
    name in what is written.
    """

    label: str
    package: Package
    members: Sequence[str]
    renderer: str
    licence: str
    options: dict = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of what is written."""
        return PurePosixPath(self.members[0]).name if self.renderer == AS_IT_IS else f"{self.label}.jsonl"

    @property
    def recipe(self) -> str:
        """Digest of everything that decides the output, so that a changed recipe is fetched anew."""
        facts = asdict(self) | {"running": platform.python_version() if self.package.registry == "local" else ""}
        return sha256_bytes(json.dumps(facts, sort_keys=True).encode())


def load_sources(mix: str, path: str | os.PathLike = SOURCES) -> list[Source]:
    """The sources of a mix, in its order. Raises DataError for a file that cannot be read or a name that is
    not in it.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        packages = {name: Package(name, **values) for name, values in table["packages"].items()}
        mixes, sources = table["mixes"], table["sources"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no list of sources: {error}") from error
    _known(mix, mixes, f"mix in {path}")
    return [_source(name, sources, packages, path) for name in mixes[mix]]


def _source(name: str, sources: dict, packages: dict[str, Package], path: str | os.PathLike) -> Source:
    _known(name, sources, f"source in {path}")
    values = {"label": name} | sources[name]
    _known(values.get("package"), packages, f"package in {path}")
    _known(values.get("renderer"), (*RENDERERS, AS_IT_IS), "renderer")
    package = packages[values["package"]]
    _known(package.registry, REGISTRIES, "registry")
    if values["renderer"] == AS_IT_IS and (len(values["members"]) != 1 or set("*?[") & set(values["members"][0])):
        raise DataError(f"{path}, source {name}: a file as it is has one member, named in full")
    try:
        return Source(**values | {"package": package})
    except TypeError as error:
        raise DataError(f"{path}, source {name}: {error}") from error


def _known(name: str, options: Iterable[str], what: str) -> None:
    if name not in options:
        raise DataError(
            f'there is no {what} named "{name}"{nearest(str(name), options)}; there are {", ".join(options)}'
        )
