"""What can be wrong with a deployment: the rules, and what breaks them."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

import attrs
from psycopg import sql

__all__ = ["RULES", "Finding", "Report", "Rule", "Severity", "finding", "quoted"]

_PLAIN_NAME = re.compile(r"[a-z_][a-z0-9_]*")


class Severity(str, Enum):
    """How bad it is; everything but advice makes the check fail."""

    CRITICAL = "critical"
    HIGH = "high"
    MEDIUM = "medium"
    ADVICE = "advice"

    __str__ = str.__str__


@attrs.frozen
class Rule:
    """Something that must hold.

    Attributes:
        severity: How bad it is if it does not.
        why: What an attacker or an accident would make of it, one sentence.
    """

    severity: Severity
    why: str


@attrs.frozen(kw_only=True)
class Finding:
    """A rule that something breaks.

    Attributes:
        code: The rule.
        severity: How bad it is.
        subject: What breaks it.
        what: How, one sentence.
        why: Why it matters, one sentence.
        fix: The SQL, or the setting, that mends it.
    """

    code: str
    severity: Severity
    subject: str
    what: str
    why: str
    fix: str


@attrs.frozen(kw_only=True)
class Report:
    """What came of a check.

    Attributes:
        target: What was checked, without secrets.
        findings: What is wrong, the worst first.
        skipped: What could not be checked, and why.
    """

    target: str
    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong; advice is no fault."""
        return all(finding.severity is Severity.ADVICE for finding in self.findings)


RULES: Final[dict[str, Rule]] = {
    "login-superuser": Rule(Severity.CRITICAL, "No policy and no privilege binds a superuser: every user sees all."),
    "login-bypasses-policies": Rule(Severity.CRITICAL, "Row-level security does not apply to it: every user sees all."),
    "login-attribute": Rule(
        Severity.HIGH, "Whoever has the application's password could make roles or copy the server."
    ),
    "login-owns": Rule(
        Severity.CRITICAL, "Policies do not bind an owner, who can also drop them and the audit triggers."
    ),
    "login-inherits": Rule(Severity.CRITICAL, "A statement that runs as nobody in particular would have these rights."),
    "login-membership-missing": Rule(Severity.HIGH, "Transactions of these users or of the service fail."),
    "login-membership-extra": Rule(Severity.HIGH, "SQL of an attacker's choice could become that role."),
    "login-may-grant": Rule(Severity.HIGH, "It could hand the role on to others, and would keep it for ever."),
    "login-is-database-role": Rule(Severity.CRITICAL, "Users could not be told apart: log in as a role of its own."),
    "login-expires": Rule(Severity.MEDIUM, "From that day on, no connection can be made."),
    "role-can-login": Rule(Severity.HIGH, "Whoever logs in as it says themself which user acts."),
    "role-attribute": Rule(Severity.CRITICAL, "Every user's transaction would have the rights of an administrator."),
    "role-bypasses-policies": Rule(Severity.CRITICAL, "Row-level security does not apply to its users."),
    "role-member": Rule(Severity.HIGH, "Its users can become the other role, or inherit its rights."),
    "role-owns": Rule(Severity.HIGH, "Policies do not bind an owner: its users are exempt from them there."),
    "session-default": Rule(Severity.CRITICAL, "Sessions begin with an identity, or without the audit triggers."),
    "owners-differ": Rule(
        Severity.MEDIUM, "Functions that run as their owner fail on tables of another, or do more than they should."
    ),
    "policies-off": Rule(Severity.CRITICAL, "Whoever may read the table at all reads every row of it."),
    "policy-extra": Rule(Severity.CRITICAL, "Permissive policies add up: each of them lets more rows through."),
    "policy-missing": Rule(Severity.HIGH, "Rows that users must see are hidden, or the service is refused."),
    "policy-altered": Rule(Severity.CRITICAL, "It lets through other rows than this release was tested with."),
    "privilege-extra": Rule(Severity.HIGH, "Privileges decide about tables and columns; this one was never meant."),
    "privilege-missing": Rule(Severity.HIGH, "Calls that need it fail."),
    "function-altered": Rule(Severity.HIGH, "Policies, audit and roles rest on what this function does."),
    "view-altered": Rule(Severity.CRITICAL, "A view that runs as its owner shows the rows of everybody."),
    "object-missing": Rule(Severity.HIGH, "Something of the schema was dropped: calls that need it fail."),
    "partition-granted": Rule(
        Severity.CRITICAL, "Row-level security does not reach a partition that is read directly."
    ),
    "relation-open": Rule(Severity.HIGH, "No policy stands between these roles and its rows."),
    "definer-search-path": Rule(
        Severity.HIGH, "Whoever may create objects can have it run theirs with its owner's rights."
    ),
    "default-privileges": Rule(Severity.MEDIUM, "Everything made from now on is open to them from its first moment."),
    "migrations": Rule(Severity.HIGH, "The schema is not the one that this release works with and was tested on."),
    "altered": Rule(Severity.HIGH, "Somebody has changed what the migrations made."),
    "tls-off": Rule(Severity.HIGH, "Passwords and rows can be read and changed on their way."),
    "tls-not-verified": Rule(Severity.HIGH, "Anybody on the way can pose as the server."),
    "tls-old": Rule(Severity.MEDIUM, "TLS before 1.2 is broken and withdrawn (RFC 8996)."),
    "password-encryption": Rule(Severity.MEDIUM, "A stolen MD5 hash is as good as the password."),
    "password-kept-as-md5": Rule(Severity.MEDIUM, "A stolen MD5 hash is as good as the password."),
    "host-rule": Rule(Severity.HIGH, "It lets in whoever asks, or takes passwords in a form that can be stolen."),
    "log-parameters": Rule(Severity.MEDIUM, "Parameters are users' data: names, amounts, addresses."),
    "log-plans": Rule(Severity.MEDIUM, "Plans hold the values that statements were run with."),
    "log-details": Rule(Severity.ADVICE, "The detail of a violated constraint is the row's value: an e-mail address."),
    "statement-timeout": Rule(Severity.MEDIUM, "One statement can hold a connection, and its locks, for ever."),
    "idle-timeout": Rule(Severity.MEDIUM, "One forgotten transaction can hold its locks for ever."),
    "server-too-old": Rule(Severity.HIGH, "The library runs on PostgreSQL 15 and later."),
    "replica-differs": Rule(Severity.HIGH, "Reads would go to another database, or to one that takes writes."),
    "statements-visible": Rule(Severity.MEDIUM, "Its users read everybody's statements, and the literals in them."),
}
"""Every rule by its code."""


def finding(code: str, subject: str, what: str, fix: str) -> Finding:
    """Return what breaks a rule.

    Args:
        code: The rule.
        subject: What breaks it.
        what: How, one sentence.
        fix: What mends it.
    """
    rule = RULES[code]
    return Finding(code=code, severity=rule.severity, subject=subject, what=what, why=rule.why, fix=fix)


def quoted(name: str) -> str:
    """Return a name as SQL, in quotes only where it needs them."""
    if name == "PUBLIC" or _PLAIN_NAME.fullmatch(name):
        return name
    return sql.Identifier(name).as_string(None)
