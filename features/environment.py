"""Settings in environment variables, told apart from variables that only begin like them.

Kubernetes and Docker give every container variables about the services around it, named after them: a service called
`penchant-metrics` makes PENCHANT_METRICS_PORT=tcp://10.0.0.1:9090 in all containers of its namespace, and a setting may
have that very name.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

_LIKENESS = 0.8
_OF_A_SERVICE = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_PORT = re.compile(r"(.*_)?PORT")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://\S+:\d+")
_log = logging.getLogger(__name__)


class Variable(NamedTuple):
    """An environment variable.

    Attributes:
        name: Its name, as it is written there.
        text: Its value.
    """

    name: str
    text: str


def variables(
    prefix: str, settings: Collection[str], environment: Mapping[str, str], foreign: Collection[str] = ()
) -> dict[str, Variable]:
    """Returns the variables that set something, by setting; logs a warning for each that seems to be one and is not.

    Args:
        prefix: Start of the names, in capitals; upper and lower case are the same.
        settings: Names of the settings, in small letters.
        environment: All variables.
        foreign: Starts of the names of other programs' variables behind the prefix, in capitals.
    """
    by_setting = {}
    for name in sorted(environment, reverse=True):  # of the same name in capitals and not, the capitals win
        variable = Variable(name, environment[name])
        setting = name.upper().removeprefix(prefix)
        if not name.upper().startswith(prefix) or (foreign and setting.startswith(tuple(foreign))):
            continue
        service = _is_of_a_service(setting, variable.text)
        if setting.lower() in settings and not service:
            by_setting[setting.lower()] = variable
        elif setting.lower() in settings:
            _log.warning(
                "%s=%s is ignored: it is the address of a service of that name, as Kubernetes sets it, and no value of "
                "the setting %s; `enableServiceLinks: false` in the pod keeps such variables out",
                *(*variable, setting.lower()),
            )
        elif not service and (near := difflib.get_close_matches(setting.lower(), settings, n=1, cutoff=_LIKENESS)):
            _log.warning("%s is ignored: there is no such setting; did you mean %s%s?", name, prefix, near[0].upper())
    return by_setting


def set_by(by_setting: Mapping[str, Variable], message: str) -> str:
    """Returns the variables of the settings that a message names, as an addition to it; "" if it names none."""
    about = [variable.name for name, variable in by_setting.items() if re.search(rf"\b{name}\b", message)]
    return f" (set by {', '.join(sorted(about))})" if about else ""


def _is_of_a_service(setting: str, text: str) -> bool:
    return bool(_OF_A_SERVICE.fullmatch(setting) or (_PORT.fullmatch(setting) and _ADDRESS.fullmatch(text)))
