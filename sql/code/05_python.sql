-- How plpy_src/ gets into the server. build.py fills in the sources.

CREATE OR REPLACE FUNCTION autoembed._load_python()
    RETURNS void
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $autoembed_python$
    # One importer holds all sources, so that a session never mixes the Python of two versions.
    import importlib.abc
    import importlib.util
    import os
    import site
    import sys

    # onnxruntime and tokenizers of the image: for this extension, not for the distribution's Python.
    packages = "/usr/local/lib/autoembed/python"
    if packages not in sys.path:
        sys.path.append(packages)
    # Packages of the environment or a home directory come last: they never stand before the server's own.
    added = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), site.getusersitepackages()]
    sys.path.sort(key=[os.path.abspath(folder) for folder in added].__contains__)

    # PL/Python puts a tab before every line of a body, those inside a string included.
    sources = {name: source.replace("\n\t", "\n") for name, source in {
@PYTHON_SOURCES@
    }.items()}

    class AutoembedImporter(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
        def find_spec(self, name, path=None, target=None):
            if name not in sources:
                return None
            spec = importlib.util.spec_from_loader(name, self, origin=f"plpy_src/{name}")
            return spec

        def is_package(self, name):
            return any(other.startswith(name + ".") for other in sources)

        def get_source(self, name):
            return sources[name]

    for name in [name for name in sys.modules if name.split(".")[0] == "autoembed"]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "AutoembedImporter"]
    sys.meta_path.insert(0, AutoembedImporter())
    GD["autoembed"] = "@BUILD@"
$autoembed_python$;
COMMENT ON FUNCTION autoembed._load_python IS
    'Puts this version''s Python modules into the session.';
