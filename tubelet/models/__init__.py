"""Models, built on timm and registered with it. Settings and names here are light; torch and timm are not imported.

`import tubelet.models` makes `timm.create_model("vit_large_patch8_224")` work: our names are registered at once when
timm is loaded already, and otherwise right after somebody loads it. A launcher that only checks settings never does.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder


def _register() -> None:
    from tubelet.models.names import register

    register()


class _AfterTimm(MetaPathFinder):
    """Sees `import timm` once, lets it happen, then registers our names."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterTimm())


def __getattr__(name: str):  # PEP 562: these need torch and timm, which a launcher does without
    if name in ("official_state_dict", "load_official"):
        return getattr(importlib.import_module("tubelet.models.official"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
