-- How plpy_src/ gets into the server. build.py fills in the sources.

CREATE OR REPLACE FUNCTION autoembed._python_sources()
    RETURNS void
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $autoembed_python$
    # PL/Python puts a tab before every line of a body, those inside a string included.
    GD["autoembed_sources"] = {name: source.replace("\n\t", "\n") for name, source in {
@PYTHON_SOURCES@
    }.items()}
$autoembed_python$;
COMMENT ON FUNCTION autoembed._python_sources IS
    'Gives _load_python() the texts of this version''s Python modules.';

CREATE OR REPLACE FUNCTION autoembed._load_python()
    RETURNS void
    LANGUAGE plpython3u
    SET search_path = pg_catalog, pg_temp
AS $python$
    # One importer holds all modules, so that a session never mixes the Python of two versions.
    import marshal
    import os
    import site
    import sys
    import zlib
    from importlib.machinery import ModuleSpec
    from importlib.util import MAGIC_NUMBER

    # onnxruntime and tokenizers of the image: for this extension, not for the distribution's Python.
    packages = "/usr/local/lib/autoembed/python"
    if packages not in sys.path:
        sys.path.append(packages)
    # Packages of the environment or a home directory come last: they never stand before the server's own.
    added = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), site.getusersitepackages()]
    sys.path.sort(key=[os.path.abspath(folder) for folder in added].__contains__)

    # Modules that a lane has compiled, in the data directory, where each backend works. No backup has them.
    folder, start, end = "pg_stat_tmp", "autoembed.", ".code"
    kept_file = f"{folder}/{start}@BUILD@.{MAGIC_NUMBER.hex()}{end}"

    def kept():
        """The compiled modules by name, each as bytes; empty if there are none that can be trusted."""
        try:
            with open(os.open(kept_file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError:
            return {}
        is_own = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        # A crash may have cut it off.
        is_whole = data[:4] == zlib.crc32(data[4:]).to_bytes(4)
        return marshal.loads(data[4:]) if is_own and is_whole else {}

    class AutoembedImporter:
        def __init__(self):
            self.compiled = kept()
            self.sources = {}
            if not self.compiled:
                plpy.execute("SELECT autoembed._python_sources()")
                self.sources = GD.pop("autoembed_sources")
            self.names = self.compiled.keys() | self.sources.keys()

        def find_spec(self, name, path=None, target=None):
            if name not in self.names:
                return None
            is_package = any(other.startswith(name + ".") for other in self.names)
            return ModuleSpec(name, self, origin=f"plpy_src/{name}", is_package=is_package)

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            name = module.__name__
            exec(marshal.loads(self.compiled[name]) if self.compiled else self.code(name), module.__dict__)

        def code(self, name):
            return compile(self.sources[name], f"plpy_src/{name}", "exec", dont_inherit=True)

        def keep(self):
            """Keeps the modules compiled for later sessions, and removes what other versions have kept for a day."""
            import time

            try:
                if self.compiled:
                    os.utime(kept_file)
                else:
                    data = marshal.dumps({name: marshal.dumps(self.code(name)) for name in self.sources})
                    new = f"{kept_file}.{os.getpid()}"
                    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                        file.write(zlib.crc32(data).to_bytes(4) + data)
                    os.rename(new, kept_file)
                for name in os.listdir(folder):
                    path = f"{folder}/{name}"
                    is_old = os.stat(path).st_mtime < time.time() - 86400
                    if name.startswith(start) and end in name and is_old:
                        os.unlink(path)
            except OSError:
                # Sessions compile for themselves then.
                pass

    for name in [name for name in sys.modules if name.split(".")[0] == "autoembed"]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "AutoembedImporter"]
    sys.meta_path.insert(0, AutoembedImporter())
    GD["autoembed"] = "@BUILD@"
$python$;
COMMENT ON FUNCTION autoembed._load_python IS
    'Puts this version''s Python modules into the session, compiled if a lane has kept them so.';
