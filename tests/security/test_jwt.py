"""Tokens: what is forged, expired, misdirected or malformed makes nobody an actor."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from equitie_data import Actor, ConfigurationError, Database, EquitieDataError, UnavailableError, acting_as, as_service
from equitie_data.errors import InvalidTokenError

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "a-shared-secret-of-more-than-32-bytes-as-supabase-has-it"
USER = UUID("6f1e0e8a-0000-4000-8000-000000000001")
CURVE = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
STRANGER = ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def jwk(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, kid: str, **more: str) -> dict[str, Any]:
    kind: Any = (
        jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
    )
    alg = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
    return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "alg": alg, "use": "sig", **more}


JWKS = {"keys": [jwk(CURVE, "curve"), jwk(RSA, "rsa"), {"kty": "oct", "kid": "shared", "k": "AAAA"}]}


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    facts = {
        "sub": str(USER),
        "aud": "authenticated",
        "iss": "https://issuer.example",
        "exp": now + 600,
        "iat": now,
        "role": "authenticated",
        "session_id": "s-1",
        "user_metadata": {"role": "superadmin"},
        **changes,
    }
    return {name: value for name, value in facts.items() if value is not None}


def signed(payload: dict[str, Any] | None = None, **header: Any) -> str:
    return jwt.encode(claims() if payload is None else payload, SECRET, "HS256", headers=header or None)


def accept(token: Any, **arguments: Any) -> Actor:
    if not {"key", "jwks"} & set(arguments):
        arguments["key"] = SECRET
    return Actor.from_jwt(token, **{"audience": "authenticated", "issuer": "https://issuer.example", **arguments})


def test_a_token_with_a_shared_secret_becomes_its_user() -> None:
    actor = accept(signed(), request_id="r-1", ip_address="203.0.113.9")
    assert (actor.kind, actor.user_id, actor.session_id, actor.request_id) == ("user", USER, "s-1", "r-1")
    assert json.loads(actor.claims) == {"sub": str(USER), "role": "authenticated"}


@pytest.mark.parametrize(("key", "kid"), [(CURVE, "curve"), (RSA, "rsa")], ids=["ES256", "RS256"])
def test_a_token_of_a_key_set_becomes_its_user(key: Any, kid: str) -> None:
    algorithm = "ES256" if kid == "curve" else "RS256"
    token = jwt.encode(claims(), key, algorithm, headers={"kid": kid})
    assert accept(token, jwks=JWKS).user_id == USER
    assert accept(token, key=pem(key)).user_id == USER
    assert accept(token, key=key.public_key()).user_id == USER


class Client(jwt.PyJWKClient):
    """A client whose issuer answers, or does not."""

    def __init__(self, answer: dict[str, Any] | None) -> None:
        super().__init__("https://issuer.example/jwks.json")
        self.answer = answer

    def fetch_data(self) -> Any:
        if self.answer is None:
            raise jwt.exceptions.PyJWKClientConnectionError("cannot fetch https://user:hunter2@issuer.example")
        return self.answer


def test_keys_can_be_fetched() -> None:
    token = jwt.encode(claims(), CURVE, "ES256", headers={"kid": "curve"})
    assert accept(token, jwks=Client({"keys": [jwk(CURVE, "curve")]})).user_id == USER
    with pytest.raises(InvalidTokenError, match="does not have"):
        accept(token, jwks=Client({"keys": [jwk(CURVE, "other")]}))
    with pytest.raises(UnavailableError, match="could not be fetched") as caught:
        accept(token, jwks=Client(None))
    assert "hunter2" not in f"{caught.value!r}{caught.value.__context__!r}{caught.value.__cause__!r}"


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "expired": (lambda: signed(claims(exp=int(time.time()) - 60)), "it has expired"),
    "without expiry": (lambda: signed(claims(exp=None)), "lacks a claim"),
    "not valid yet": (lambda: signed(claims(nbf=int(time.time()) + 60)), "not valid yet"),
    "issued in the future": (lambda: signed(claims(iat=int(time.time()) + 600)), "not valid yet|in the future"),
    "for another audience": (lambda: signed(claims(aud="somebody else")), "another audience"),
    "for nobody": (lambda: signed(claims(aud=None)), "lacks a claim"),
    "by another issuer": (lambda: signed(claims(iss="https://evil.example")), "by somebody else"),
    "by nobody": (lambda: signed(claims(iss=None)), "lacks a claim"),
    "without a subject": (lambda: signed(claims(sub=None)), "lacks a claim"),
    "the key of the service": (lambda: signed(claims(sub=None, role="service_role")), "lacks a claim"),
    "a subject that is no UUID": (lambda: signed(claims(sub="1 OR 1=1")), "no UUID"),
    "another secret": (lambda: jwt.encode(claims(), SECRET + "x", "HS256"), "signature"),
    "no algorithm": (lambda: jwt.encode(claims(), None, "none"), "algorithm"),
    "another algorithm": (lambda: jwt.encode(claims(), SECRET * 2, "HS512"), "algorithm"),
    "unknown extensions": (lambda: signed(None, crit=["b64"], b64=False), "extensions|form"),
    "no token": (lambda: "no token", "form"),
    "nothing": (lambda: "", "form"),
    "bytes": (lambda: signed().encode(), "form"),
    "None": (lambda: None, "form"),
    "with a line break": (lambda: signed() + "\n", "form|signature"),
    "huge": (lambda: signed(claims(more="x" * 20_000)), "form"),
    "not ASCII": (lambda: signed() + "\u0130", "form"),
    "deep": (
        lambda: raw(b'{"alg":"HS256","x":' + b"[" * 3_000 + b"]" * 3_000 + b"}", b"{}"),
        "form|algorithm|signature",
    ),
}


def raw(header: bytes, payload: bytes, signature: bytes = b"x") -> str:
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (header, payload, signature))


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_hold_is_refused_with_its_reason(what: str) -> None:
    make, reason = REFUSED[what]
    with pytest.raises(InvalidTokenError, match=reason) as caught:
        accept(make())
    # Neither the message nor anything that hangs on the error says what the token said.
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    assert "OR 1=1" not in str(caught.value)


def test_a_public_key_cannot_be_used_as_a_shared_secret() -> None:
    # The classic: a token signed by HS256 with the public key as its secret, which everybody knows.
    header = b'{"alg":"HS256","typ":"JWT"}'
    body = json.dumps(claims()).encode()
    unsigned = raw(header, body).rpartition(".")[0]
    signature = hmac.new(pem(RSA), unsigned.encode(), hashlib.sha256).digest()
    forged = f"{unsigned}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    for arguments in ({"key": pem(RSA)}, {"jwks": JWKS}, {"key": RSA.public_key()}):
        with pytest.raises(InvalidTokenError, match="algorithm"):
            accept(forged, **arguments)
    with pytest.raises(ConfigurationError, match="those of public keys"):
        accept(forged, key=pem(RSA), algorithms=["RS256", "HS256"])


def test_a_key_of_the_tokens_own_is_not_used() -> None:
    own = jwk(STRANGER, "curve")
    for header in ({"jwk": own}, {"jku": "https://evil.example/jwks.json"}, {"x5u": "https://evil.example"}, {}):
        token = jwt.encode(claims(), STRANGER, "ES256", headers={"kid": "curve", **header})
        with pytest.raises(InvalidTokenError, match="signature"):
            accept(token, jwks=JWKS)


def test_a_token_names_a_key_that_is_there() -> None:
    for kid in ("shared", "nobody", "../../etc/passwd", "' OR 1=1 --", None):
        token = jwt.encode(claims(), CURVE, "ES256", headers={} if kid is None else {"kid": kid})
        with pytest.raises(InvalidTokenError, match="does not have"):
            accept(token, jwks=JWKS)
    only = {"keys": [jwk(CURVE, "curve"), jwk(RSA, "rsa", use="enc")]}
    assert accept(jwt.encode(claims(), CURVE, "ES256"), jwks=only).user_id == USER


def test_an_algorithm_of_another_kind_of_key_is_refused() -> None:
    token = jwt.encode(claims(), CURVE, "ES256", headers={"kid": "rsa"})
    with pytest.raises(InvalidTokenError):
        accept(token, jwks=JWKS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"key": None, "jwks": None}, "either the key"),
        ({"key": SECRET, "jwks": JWKS}, "either the key"),
        ({"key": "short"}, "could be guessed"),
        ({"algorithms": ["none"]}, "algorithms must be"),
        ({"algorithms": []}, "algorithms must be"),
        ({"algorithms": ["RS256"]}, "those of a shared secret"),
        ({"jwks": JWKS, "algorithms": ["HS256"]}, "those of public keys"),
        ({"audience": ""}, "audience is missing"),
        ({"audience": None}, "audience is missing"),
        ({"leeway": 3600}, "leeway"),
        ({"leeway": -1}, "leeway"),
        ({"jwks": {"keys": "none"}}, "key set"),
        ({"jwks": "https://issuer.example"}, "key set"),
    ],
)
def test_arguments_that_protect_nothing_are_refused(arguments: dict[str, Any], reason: str) -> None:
    token = signed() if "jwks" not in arguments or arguments["jwks"] is None else jwt.encode(claims(), CURVE, "ES256")
    with pytest.raises(ConfigurationError, match=reason) as caught:
        accept(token, **arguments)
    assert SECRET not in str(caught.value)


def test_the_clocks_of_two_machines_may_differ_a_little() -> None:
    late = signed(claims(exp=int(time.time()) - 20))
    assert accept(late, leeway=30.0).user_id == USER
    with pytest.raises(InvalidTokenError, match="expired"):
        accept(late, leeway=0.0)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_a_token_is_accepted(data: st.DataObject) -> None:
    token = signed(claims(exp=4_102_444_800, iat=1))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete", "swap", "claims", "header"]))
    place = data.draw(st.integers(0, len(token) - 1))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.=+/ "
    letter = data.draw(st.sampled_from(letters))
    header, body, signature = token.split(".")
    if kind == "replace":
        changed = token[:place] + letter + token[place + 1 :]
    elif kind == "insert":
        changed = token[:place] + letter + token[place:]
    elif kind == "delete":
        changed = token[:place] + token[place + 1 :]
    elif kind == "swap":
        changed = ".".join(data.draw(st.permutations([header, body, signature])))
    elif kind == "claims":
        said = claims(sub=str(data.draw(st.uuids())), exp=4_102_444_800, iat=1)
        changed = f"{header}.{raw(b'', json.dumps(said).encode()).split('.')[1]}.{signature}"
    else:
        algorithm = data.draw(st.sampled_from(["none", "None", "NONE", "HS384", "RS256", "", None, 7, ["HS256"]]))
        changed = f"{raw(json.dumps({'alg': algorithm}).encode(), b'').split('.')[0]}.{body}.{signature}"
    try:
        actor = accept(changed)
    except InvalidTokenError:
        return
    # The one thing that may differ: bits of the last character that its base64 does not use.
    assert actor.user_id == USER
    assert padded(changed) == padded(token)


def padded(token: str) -> list[bytes]:
    return [base64.urlsafe_b64decode(part.encode() + b"=" * (-len(part) % 4)) for part in token.split(".")]


@given(token=st.text(max_size=200) | st.binary(max_size=200).map(lambda body: raw(b'{"alg":"HS256"}', body)))
def test_nonsense_is_refused_and_breaks_nothing(token: str) -> None:
    with pytest.raises(EquitieDataError):
        accept(token)


def test_metadata_that_the_user_may_edit_raises_no_right(database: Database) -> None:
    actor = accept(signed(claims(role="service_role", app_metadata={"role": "admin"})))
    with acting_as(actor, request_id="r-2") as acting:
        assert acting.request_id == "r-2"
        assert database.execute_read("SELECT current_user, count(*) FROM public.transactions_clean") == [
            ("authenticated", 0)
        ]


def test_acting_as_takes_a_users_actor_and_no_others() -> None:
    with acting_as(accept(signed())) as actor:
        assert actor.user_id == USER
    with as_service("a test") as service, pytest.raises(ConfigurationError, match="as_service"), acting_as(service):
        pass
    other = uuid4()
    with acting_as(other) as actor:
        assert actor.user_id == other


def test_without_the_extra_a_sentence_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['jwt'] = None\n"
        "from equitie_data import Actor, ConfigurationError\n"
        "try: Actor.from_jwt('x', audience='a', key='k')\n"
        "except ConfigurationError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Actor.from_jwt needs PyJWT: install it with `pip install 'equitie-data[jwt]'`."
