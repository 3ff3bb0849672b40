"""An OpenAI-style server around whatever `loading.opened` opens: transformers' own, with our model in the place of what it would load.

transformers looks a model up by its class's name in its own package, which no adapter, tier or table can get through. So its
`ModelManager` is given a model that is already open; routes, streaming and generation stay the library's. Requests are generated
one after another: what is looked back on lies in the request's own cache, and nothing is shared.

Continuous batching packs requests into one row with a paged cache. That loses every token before a chunk, without an error, and
other requests' tokens take their place; it is refused.
"""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from nengram.config import TableOptions
from nengram.errors import ConfigError
from nengram.hf.loading import Opened, opened

try:
    from transformers.cli import serve as theirs
    from transformers.cli.serving import model_manager
    from transformers.utils.import_utils import is_serve_available
except ModuleNotFoundError as missing:
    raise ConfigError(f"{missing.name} is missing: pip install nengram[serve]") from None

READY_S = 60.0
# Of a base model, which knows no roles:
PLAIN_CHAT = "{{ bos_token or '' }}{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"


def run_serve(
    where: Path,
    *,
    adapters: Sequence[Path],
    tables: TableOptions,
    host: str,
    port: int,
    device: str,
    continuous_batching: bool,
    console: Console,
) -> None:
    """Serve a model until interrupted. Raises: as `served`."""
    how = {"adapters": adapters, "tables": tables, "device": device, "continuous_batching": continuous_batching}
    with served(where, host=host, port=port, console=console, **how) as server:
        told = f"{where} ({server.opened.kind}), tables {tables.table_tier}: {server.url}, model name {server.name}"
        console.print(told, highlight=False, soft_wrap=True)
        server.wait()


@contextmanager
def served(
    where: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    tables: TableOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    continuous_batching: bool = False,
    console: Console | None = None,
) -> Iterator["Server"]:
    """A server that answers while the block runs, on a thread of its own.

    where, adapters, tables, device: as `opened`. port: 0 for any that is free. Clients name the model `str(where)`, or none.
    Raises: ConfigError for a port that is taken and for continuous batching; as `opened`.
    """
    if continuous_batching:
        raise ConfigError(
            "continuous batching packs requests into one row, and a memory would look back into other requests' text: "
            "serve without it, requests are then answered one after another"
        )
    if not is_serve_available():
        raise ConfigError("fastapi, uvicorn or openai is missing: pip install nengram[serve]")
    port = _free_port(host, port)
    with opened(where, adapters=adapters, tables=tables, device=device, console=console) as one:
        if one.tokenizer.chat_template is None:
            one.tokenizer.chat_template = PLAIN_CHAT
        server = Server(one, str(where), host, port)
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Server(theirs.Serve):
    """transformers' server with one model that is open already. name: what clients call the model."""

    def __init__(self, one: Opened, name: str, host: str, port: int) -> None:
        self.opened, self.name, self.url = one, name, f"http://{_in_url(host)}:{port}/v1"
        with mock.patch.object(model_manager, "ModelManager", _manager_of(one)):
            super().__init__(force_model=name, host=host, port=port, device="cpu", non_blocking=True)
        self._thread = threading.Thread(target=self.server.run, name="nengram-serve", daemon=True)

    def start_server(self) -> None:
        """What the library calls when it is made: not yet."""

    def start(self) -> None:
        """Begin to answer. Raises: ConfigError when the address cannot be listened on."""
        self._thread.start()
        until = time.monotonic() + READY_S
        while not self.server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise ConfigError(f"{self.url}: the server did not start; choose another --host or --port")
            time.sleep(0.01)

    def wait(self) -> None:
        """Until the server ends, or the user ends it."""
        while self._thread.is_alive():
            self._thread.join(timeout=0.5)

    def stop(self) -> None:
        """Answer what was asked, and no more."""
        self.server.should_exit = True
        self._thread.join(timeout=READY_S)


def _manager_of(one: Opened) -> type:
    class Manager(model_manager.ModelManager):
        """Has one model, and loads none: not even when a client asks for another, or for this one again."""

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return one.tokenizer

        def _load_model(self, name: str, *_: Any, **__: Any) -> Any:
            if name != self.process_model_name(self.force_model):
                raise ValueError(f"this server has {self.force_model} and loads nothing else")
            return one.model

    return Manager


def _free_port(host: str, port: int) -> int:
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with closing(socket.socket(kind, socket.SOCK_STREAM)) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
            return trial.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port} cannot be listened on: {reason}; choose another --host or --port") from None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
