"""Django's settings, before the first model is defined. A test gives the name and port of its database."""

from __future__ import annotations

import django
from django.conf import settings

from harness import HOST, PASSWORD

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "HOST": HOST, "PASSWORD": PASSWORD}},
    USE_TZ=True,
)
django.setup()
APP_LABEL = "interop"
