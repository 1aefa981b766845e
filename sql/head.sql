\echo Use "CREATE EXTENSION autoembed CASCADE" to load this file. \quit

-- Without this, a function in a schema of the database's owner would run with a superuser's rights.
SET LOCAL search_path = pg_catalog, pg_temp;
-- Functions may name others that come later.
SET LOCAL check_function_bodies = off;
SET LOCAL client_min_messages = warning;

DO LANGUAGE plpython3u $python$
    import importlib

    for package in ("requests", "numpy", "orjson"):
        try:
            importlib.import_module(package)
        except ImportError:
            plpy.error(
                f"the Python package {package} is not installed on this server",
                hint=f"Install it for the Python that PL/Python uses (on Debian: apt-get install python3-{package}).",
                sqlstate="58P01",
            )
$python$;
