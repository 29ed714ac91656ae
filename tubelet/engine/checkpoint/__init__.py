"""Checkpoints: publish, choose, verify, load, prune, export. The format is described in `format.py`."""

from tubelet.engine.checkpoint.export import export
from tubelet.engine.checkpoint.folder import choose, prune, published, verify
from tubelet.engine.checkpoint.format import read_manifest
from tubelet.engine.checkpoint.load import Restored, assemble, restore
from tubelet.engine.checkpoint.save import save

__all__ = ["Restored", "assemble", "choose", "export", "prune", "published", "read_manifest", "restore", "save", "verify"]
