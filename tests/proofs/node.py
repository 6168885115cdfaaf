"""The JavaScript of docs/backend.md against a real service with a token: it works as it is printed.

    python -m tests.proofs.node build/node

The folder holds `node_modules` with @grpc/grpc-js and @grpc/proto-loader. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.fixtures import serving
from tests.world import publish_world

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-the-example-0123456789"


def example() -> str:
    """Returns the program that the page prints."""
    [program] = re.findall(r"```js\n(.*?)```", (ROOT / "docs/backend.md").read_text(encoding="utf-8"), re.DOTALL)
    return str(program)


def run(script: Path, modules: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as the page says: in the root of the repository."""
    environment = os.environ | {"NODE_PATH": str(modules)}
    command = ["node", str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


def prove(modules: Path) -> dict[str, Any]:
    """Runs the example with the token and, as a control, with a wrong one; what it answered."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        token, script = root / "token", root / "feed.js"
        token.write_text(TOKEN)
        token.chmod(0o600)
        script.write_text(example())
        with serving(publish_world(root / "bundle"), root / "state", token_file=str(token), workers=2) as service:
            done = run(script, modules, service.target, TOKEN)
            assert done.returncode == 0, done.stderr
            refused = run(script, modules, service.target, "another")
            with service.client(token=TOKEN) as client:
                profile = client.get_profile("ann")
    assert refused.returncode == 1, refused.stdout
    assert refused.stderr.startswith("16 "), refused.stderr  # UNAUTHENTICATED
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["status"]["profile_version"] == str(profile.profile_version), answer["status"]
    assert answer["next"]["profile_version"] == answer["status"]["profile_version"], answer["next"]
    assert (answer["next"]["rung"], answer["next"]["degraded"]) == ("RUNG_SEQUENCE", [])
    assert all(item["title"] and item["price"] > 0 for item in answer["first"]), answer["first"]
    return {"version": answer["status"]["profile_version"], "rung": answer["next"]["rung"], "refused": refused.stderr}


if __name__ == "__main__":
    print(json.dumps(prove(Path(sys.argv[1]).resolve() / "node_modules")))
