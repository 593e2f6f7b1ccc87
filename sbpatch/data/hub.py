"""The Hugging Face hub, where it answers, else its cache."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants as hub

CONNECT_SECONDS = 5  # how long a server may be silent before it counts as out of reach


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Inside, Hugging Face code uses its cache alone if the hub does not answer; by itself it retries for a minute."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not answers(hub.ENDPOINT)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # a refusal is an answer
    except (OSError, http.client.HTTPException) as error:
        # So is a certificate that Python does not know: the hub's own client may.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True
