"""Tokens: what a scope covers, and every way a token can be worth nothing."""

import pytest

from moestro.core.errors import AccessError, ConfigError
from moestro.ship.store import Store
from moestro.ship.tokens import Scope, authenticate, new_token, revoke_token


@pytest.mark.parametrize(
    ("scope", "action", "package_id", "allowed"),
    [
        ("read:demo", "read", "demo", True),
        ("read:demo", "read", "demo2", False),
        ("read:demo-*", "read", "demo-7b", True),
        ("read:demo-*", "read", "demo", False),
        ("read:*", "publish", "demo", False),
        ("publish:demo", "read", "demo", True),
        ("publish:demo", "admin", "demo", False),
        ("admin:*", "publish", "anything", True),
    ],
)
def test_scopes(scope: str, action: str, package_id: str, allowed: bool) -> None:
    assert Scope.parse(scope).allows(action, package_id) is allowed


@pytest.mark.parametrize("scope", ["read", "write:demo", "read:", "read:*demo", "read:../x", "admin: *", "read:a b"])
def test_a_malformed_scope_is_named(scope: str) -> None:
    with pytest.raises(ConfigError, match="scope is"):
        Scope.parse(scope)


def test_only_the_right_unexpired_unrevoked_token_counts(store: Store) -> None:
    text = new_token(store.db, "me", ["read:demo"], lifetime_s=60)
    assert authenticate(store.db, text).name == "me"
    secret = text.rpartition("_")[2]
    assert secret not in str(store.db.rows("SELECT * FROM token")), "the store does not know the secret"
    last = "A" if text[-1] != "A" else "B"
    for wrong in (text[:-1] + last, text[:-1], "", "moe_", text.upper(), "moe_" + "0" * 16 + "_" + secret):
        with pytest.raises(AccessError, match="not one of this store"):
            authenticate(store.db, wrong)
    old = new_token(store.db, "old", ["read:demo"], lifetime_s=60, now=1_000_000)
    with pytest.raises(AccessError, match="expired"):
        authenticate(store.db, old)
    revoke_token(store.db, text.split("_")[1])
    with pytest.raises(AccessError, match="revoked"):
        authenticate(store.db, text)
