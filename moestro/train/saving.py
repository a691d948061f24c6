"""Write a checkpoint from several ranks while training goes on.

    begin: leader makes the folder aside -> every rank copies what it holds, a thread writes it to a file of its own
    step, step, ... -> all have finished -> the leader adds digests and renames: only now there is a checkpoint

Threads touch files only; what ranks tell each other goes through the ordinary exchanges between two steps. (Background
collectives on the group that training uses hang or crash on gloo.)
"""

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.core.config import to_table
from moestro.core.errors import CheckpointError, Error, StorageError
from moestro.core.files import ASIDE, cannot_write, flush_path, put_in_place, sha256_of
from moestro.core.tokens import Tokenizer
from moestro.nn.decoder import Decoder
from moestro.train.checkpoint import write_manifest
from moestro.train.rank_state import MESH
from moestro.train.shards import Part, write_parts


@dataclass(slots=True)
class Saving:
    """One checkpoint on its way to the disk, as one rank sees it."""

    folder: Path
    step: int
    digests: dict[str, str] = field(default_factory=dict)
    error: Error | None = None
    thread: threading.Thread | None = None

    @property
    def aside(self) -> Path:
        """Where files are until all are there."""
        return self.folder.with_name(self.folder.name + ASIDE)

    @property
    def finished(self) -> bool:
        """True when this rank's files are on the disk, or could not be."""
        return self.thread is None or not self.thread.is_alive()

    def begin(self, model: Decoder, tokenizer: Tokenizer, mesh: Mapping[str, Any]) -> None:
        """Leader: an empty folder with the files that only it writes."""
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
            (self.aside / "model.json").write_text(json.dumps(to_table(model.spec), indent=1))
            (self.aside / MESH).write_text(json.dumps(mesh, indent=1))
            tokenizer.save(self.aside / "tokenizer.json")
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def start(self, rank: int, parts: dict[str, list[Part]]) -> None:
        """Copy `parts` (of each kind of file) and let a thread write them."""
        copies = {
            kind: [(name, shape, box, part.detach().cpu().clone()) for name, shape, box, part in members]
            for kind, members in parts.items()
        }
        self.thread = threading.Thread(target=self._write, args=(rank, copies), daemon=True)
        self.thread.start()

    def _write(self, rank: int, parts: dict[str, list[Part]]) -> None:
        try:
            for kind, members in parts.items():
                path = self.aside / f"{kind}-{rank:05d}.safetensors"
                write_parts(path, members)
                flush_path(path)
                self.digests[path.name] = sha256_of(path)
        except OSError as error:
            self.error = cannot_write(self.folder, error)
        except (CheckpointError, StorageError) as error:
            self.error = error

    def wait(self) -> None:
        """Until this rank's files are written."""
        if self.thread is not None:
            self.thread.join()

    def commit(self, digests: list[dict[str, str]], errors: list[str]) -> None:
        """Leader: make it a checkpoint, or remove it and raise what went wrong on any rank."""
        if errors:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise CheckpointError(errors[0])
        try:
            merged = {name: digest for one in digests for name, digest in one.items()}
            merged |= {path.name: sha256_of(path) for path in self.aside.glob("*.json")}
            write_manifest(self.aside, self.step, merged)
            put_in_place(self.aside, self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
