"""Actors from JSON web tokens that are verified and not just read; needs the extra ``jwt``.

What counts is RFC 8725's list: the algorithms are the application's choice and never the token's, a key is used for
its own kind of algorithm alone, and signature, expiry, audience, issuer and subject are all checked. Only ``sub`` is
taken for a fact about the user. Roles are looked up in the database at every transaction: nothing in a token, its
user-editable metadata least of all, can raise them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import jwt
from jwt.exceptions import (
    ExpiredSignatureError,
    ImmatureSignatureError,
    InvalidAlgorithmError,
    InvalidAudienceError,
    InvalidIssuedAtError,
    InvalidIssuerError,
    InvalidSignatureError,
    MissingRequiredClaimError,
    PyJWKClientConnectionError,
    PyJWTError,
)

from equitie_data.context import Actor
from equitie_data.errors import ConfigurationError, InvalidTokenError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["actor_from_jwt"]

_SYMMETRIC: Final = ("HS256", "HS384", "HS512")
_ASYMMETRIC: Final = ("ES256", "ES384", "ES512", "EdDSA", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512")
_DEFAULT_ASYMMETRIC: Final = ("ES256", "RS256", "EdDSA")
_SHORTEST_SECRET: Final = 32  # bytes: what HS256 gives away of a shorter one can be searched (RFC 7518, 3.2)
_LONGEST_TOKEN: Final = 16_384  # characters
_MOST_LEEWAY: Final = 300.0  # seconds

# What went wrong, in the order in which one error class is another's parent.
_REASONS: Final[tuple[tuple[type[PyJWTError], str], ...]] = (
    (ExpiredSignatureError, "it has expired"),
    (ImmatureSignatureError, "it is not valid yet"),
    (InvalidIssuedAtError, "it was issued in the future"),
    (InvalidAudienceError, "it was issued for another audience"),
    (InvalidIssuerError, "it was issued by somebody else"),
    (InvalidAlgorithmError, "its algorithm is not allowed"),
    (InvalidSignatureError, "its signature does not hold"),
    (MissingRequiredClaimError, "it lacks a claim that it must have"),
)


def actor_from_jwt(
    token: str,
    *,
    audience: str | Sequence[str],
    key: object = None,
    jwks: Any = None,
    algorithms: Sequence[str] | None = None,
    issuer: str | Sequence[str] | None = None,
    leeway: float = 10.0,
    ip_address: str | None = None,
    user_agent: str | None = None,
    session_id: str | None = None,
    request_id: str | None = None,
    tenant_id: str | None = None,
) -> Actor:
    """Verify a token and return the user it speaks of; `Actor.from_jwt` is the same.

    Args:
        token: The token alone, without ``Bearer``.
        audience: Whom it must have been issued for; one of several is enough.
        key: The one key: a shared secret of 32 bytes or more, or a public key (PEM, or an object of `cryptography`).
        jwks: Instead of ``key``, the issuer's public keys: a JSON web key set, or a `jwt.PyJWKClient`, which fetches
            and caches one.
        algorithms: Those that are allowed; by default HS256 for a shared secret, and for public keys ES256, RS256 and
            EdDSA.
        issuer: Who must have issued it; not checked when left out.
        leeway: Seconds that two clocks may differ, at most 300.
        ip_address: As in `acting_as`; so are the other arguments.
        user_agent: As in `acting_as`.
        session_id: As in `acting_as`; the token's own claim when left out.
        request_id: As in `acting_as`.
        tenant_id: As in `acting_as`.

    Raises:
        InvalidTokenError: The token does not hold; answer 401. The message says which check failed, never what the
            token said.
        ConfigurationError: The arguments would not protect anything.
        UnavailableError: The key set could not be fetched.
    """
    allowed = _allowed(key, jwks, algorithms)
    if not audience:
        raise ConfigurationError("audience is missing: a token for another application must not be taken for ours.")
    if not 0 <= leeway <= _MOST_LEEWAY:
        raise ConfigurationError(f"leeway must be 0 to {_MOST_LEEWAY:g} seconds, not {leeway!r}.")
    if jwks is not None and not hasattr(jwks, "get_signing_key_from_jwt"):
        jwks = _public_keys(jwks)
    claims = _verified(token, key, jwks, allowed, audience, issuer, leeway)
    if session_id is None and isinstance(claims.get("session_id"), str):
        session_id = claims["session_id"]
    return Actor(
        kind="user",
        user_id=_subject(claims),
        ip_address=ip_address,
        user_agent=user_agent,
        session_id=session_id,
        request_id=request_id,
        tenant_id=tenant_id,
    )


def _allowed(key: object, jwks: object, algorithms: Sequence[str] | None) -> tuple[str, ...]:
    """Return the algorithms a token may be signed with: of the key's own kind, whatever the token says."""
    if (key is None) == (jwks is None):
        raise ConfigurationError("from_jwt needs either the key or the issuer's key set (jwks).")
    shared = isinstance(key, str | bytes) and not _is_public_key(key)
    if shared and len(key if isinstance(key, bytes) else str(key).encode()) < _SHORTEST_SECRET:
        raise ConfigurationError(f"The shared secret is shorter than {_SHORTEST_SECRET} bytes: it could be guessed.")
    possible = _SYMMETRIC if shared else _ASYMMETRIC
    if algorithms is None:
        return ("HS256",) if shared else _DEFAULT_ASYMMETRIC
    chosen = (algorithms,) if isinstance(algorithms, str) else tuple(algorithms)
    if not chosen or not set(chosen) <= set(possible):
        # A public key is public: whoever could use it as a shared secret could sign as anybody.
        kind = "a shared secret" if shared else "public keys"
        raise ConfigurationError(f"algorithms must be some of {', '.join(possible)}, which are those of {kind}.")
    return chosen


def _is_public_key(key: str | bytes) -> bool:
    text = key if isinstance(key, bytes) else key.encode()
    return b"-----BEGIN" in text or text.lstrip().startswith((b"ssh-", b"ecdsa-"))


def _verified(  # noqa: PLR0917 - the public function's arguments, handed on
    token: str,
    key: Any,
    jwks: Any,
    algorithms: tuple[str, ...],
    audience: str | Sequence[str],
    issuer: str | Sequence[str] | None,
    leeway: float,
) -> dict[str, Any]:
    if not isinstance(token, str) or len(token) > _LONGEST_TOKEN or not token.isascii():
        raise InvalidTokenError("it has not the form of one")
    try:
        header = jwt.get_unverified_header(token)
        if header.get("alg") not in algorithms:
            reason = "its algorithm is not allowed"
        elif "crit" in header:
            reason = "it demands extensions that are not known here"
        else:
            found = key if jwks is None else _key_of(jwks, token, header.get("kid"))
            if found is not None:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    found,
                    algorithms=list(algorithms),
                    audience=audience,
                    issuer=issuer,
                    leeway=leeway,
                    options={"require": ["exp", "sub", "aud", *(["iss"] if issuer else [])], "verify_signature": True},
                )
                return claims
            reason = "it is signed with a key that its issuer does not have"
    except PyJWKClientConnectionError:
        reason = ""
    except PyJWTError as error:
        reason = next((text for kind, text in _REASONS if isinstance(error, kind)), "it has not the form of one")
    except (ValueError, TypeError, RecursionError):
        reason = "it has not the form of one"
    # Not within the handlers: an error's context would carry along what the token says.
    if not reason:
        raise UnavailableError("The issuer's keys could not be fetched: no token can be verified until they are.")
    raise InvalidTokenError(reason)


def _key_of(jwks: Any, token: str, kid: object) -> Any:
    """Return the issuer's key that the token names; ``None`` if it has no such key."""
    if hasattr(jwks, "get_signing_key_from_jwt"):
        try:
            return jwks.get_signing_key_from_jwt(token)
        except PyJWKClientConnectionError:
            raise
        except PyJWTError:
            return None
    if kid is None:
        return jwks[0] if len(jwks) == 1 else None
    return next((each for each in jwks if each.key_id == kid), None)


def _public_keys(jwks: Mapping[str, Any]) -> list[jwt.PyJWK]:
    entries = jwks.get("keys") if hasattr(jwks, "get") else None
    if not isinstance(entries, list | tuple):
        raise ConfigurationError('jwks must be a JSON web key set, {"keys": [...]}, or a jwt.PyJWKClient.')
    keys = []
    for entry in entries:
        try:
            # A shared secret has no business among public keys, nor has a key to encrypt with.
            if entry.get("kty") != "oct" and entry.get("use", "sig") == "sig":
                keys.append(jwt.PyJWK(entry))
        except (PyJWTError, AttributeError):
            continue  # no key, or of a kind that is newer than the library
    return keys


def _subject(claims: dict[str, Any]) -> UUID:
    subject = claims.get("sub")
    try:
        if isinstance(subject, str):
            return UUID(subject)
    except ValueError:
        pass
    raise InvalidTokenError("its subject is no UUID")
