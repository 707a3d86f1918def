"""What keeps the cached prefixes of one tenant from the requests of another."""

from __future__ import annotations

import hmac

from shared.contract import DEFAULT_TENANT
from shared.settings import Settings


def cache_salt(tenant: str, settings: Settings) -> str | None:
    """Mixed into the hashes of a tenant's cached blocks; ``None`` where tenants share, or where the request names none.

    The same on every worker, and, with a signing key, not to be guessed.
    """
    if settings.optimization.cache.shared_between_tenants or tenant == DEFAULT_TENANT:
        return None
    key = settings.fleet.signing_key
    secret = b"muai" if key is None else key.get_secret_value().encode()
    return hmac.digest(secret, f"cache:{tenant}".encode(), "sha256").hex()[:32]
