"""The Python of autoembed that runs inside the database server."""
