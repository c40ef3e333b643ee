"""Lets the build backend compile the engine. What cannot be built is left out, and said."""

import runpy
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

HERE = Path(__file__).parent


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Wheels and editable installs get `_native.so`; source distributions are left alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        problem = runpy.run_path(str(HERE / "build.py"))["build"]()
        if problem is not None:
            sys.stderr.write(f"kvrelay: no compiled engine, torch computes instead: {problem}\n")
            return
        build_data["artifacts"].append("kvrelay/native/_native.so")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
