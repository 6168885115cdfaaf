"""Loads every Lua script of `serving/stores/lua` into a Redis, which compiles it and says where it is wrong.

    python tests/lua_syntax.py

Ends with status 1 if a script is wrong, includes what does not exist, or is used nowhere.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from redis.exceptions import ResponseError

ROOT = Path(__file__).parents[1]
LUA = ROOT / "serving" / "stores" / "lua"


def main() -> int:
    """Prints one line per mistake; returns the exit status."""
    sys.path.insert(0, str(ROOT))
    from serving.redis.client import connect_one
    from serving.redis.embedded import RedisServer
    from serving.stores.scripts import read_script

    names = {str(path.relative_to(LUA).with_suffix("")) for path in LUA.rglob("*.lua")}
    texts = {name: (LUA / f"{name}.lua").read_text(encoding="utf-8") for name in names}
    included = {include for text in texts.values() for include in re.findall(r"^--! include (.+)$", text, re.MULTILINE)}
    loader = (ROOT / "serving" / "stores" / "scripts.py").read_text(encoding="utf-8")
    loaded = set(re.findall(r'_script\("([^"]+)"', loader))
    mistakes = [f"{name}.lua is used by no script" for name in sorted(names - included - loaded)]
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder), "profiles") as server,
        connect_one(server.url, timeout_s=5.0) as client,
    ):
        for name in sorted(names):
            try:
                client.script_load(read_script(name))
            except (ResponseError, KeyError, FileNotFoundError) as error:
                mistakes.append(f"{name}.lua: {error}")
    print(*mistakes, f"Lua scripts: {len(names)}, mistakes: {len(mistakes)}", sep="\n")
    return int(bool(mistakes))


if __name__ == "__main__":
    raise SystemExit(main())
