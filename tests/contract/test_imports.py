"""What the source may say at all: who imports whom, and what nobody calls."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kvrelay", "coordinator", "prefill_svc", "decode_svc")

BANNED_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "torch.hub.load", "numpy.load", "np.load"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "tempfile.mktemp"),
}

# The only places where a module may be imported; `*` stands for anything.
ONLY_IN = {
    "triton": ("kvrelay/kernels/*",),
    "cupy": ("kvrelay/kernels/*", "kvrelay/transfer/cuda_ipc.py", "kvrelay/transfer/nccl.py"),
    "msgpack": ("kvrelay/transfer/manifest.py",),
    "nixl": ("kvrelay/transfer/nixl.py",),
    "kvrelay.v1": (
        *("kvrelay/rpc/*", "kvrelay/transfer/stream.py", "kvrelay/client.py"),
        *("*/service.py", "*/convert.py", "*/workers.py", "*/__main__.py"),
        # The puller's end of a handoff.
        "decode_svc/holder.py",
    ),
}

Source = tuple[str, ast.Module]


@cache
def sources() -> tuple[Source, ...]:
    """Every module of the product that a person wrote: its path from the root and its tree."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    named = ((path.relative_to(ROOT).as_posix(), path) for path in paths)
    return tuple(
        (name, ast.parse(path.read_text(), name))
        for name, path in named
        if not name.startswith("kvrelay/v1/")
    )


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def called(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def is_or_is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_import_contracts_hold():
    """
    import-linter keeps every contract of `.importlinter`.
    """
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


def test_what_calls_itself_pure_is_held_to_it():
    """
    A module whose docstring says `Pure.` is in the contract that proves it.
    """
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    proven = config["importlinter:contract:pure"]["source_modules"].split()
    claims = {
        name.removesuffix(".py").replace("/", ".")
        for name, tree in sources()
        if re.search(r"^Pure[.:,]", ast.get_docstring(tree) or "", re.MULTILINE)
    }

    assert claims <= set(proven)


def test_nothing_that_runs_data_as_code_is_imported():
    """
    No pickle, in none of its disguises.
    """
    found = [
        (name, module)
        for name, tree in sources()
        for module in imported(tree)
        if module.partition(".")[0] in BANNED_MODULES
    ]

    assert not found


def test_nothing_that_runs_data_as_code_is_called():
    """
    No `eval`, no `torch.load`, no shell.
    """
    found = [
        (name, node.lineno, function)
        for name, tree in sources()
        for function, node in called(tree)
        if function in BANNED_CALLS or any(k.arg == "shell" for k in node.keywords)
    ]

    assert not found


@pytest.mark.parametrize("module", ONLY_IN)
def test_a_module_with_a_place_is_imported_only_there(module):
    """
    Each of these has one home, so that replacing it touches little.
    """
    found = [
        name
        for name, tree in sources()
        if any(is_or_is_in(other, module) for other in imported(tree))
        and not any(PurePosixPath(name).match(pattern) for pattern in ONLY_IN[module])
    ]

    assert not found


def test_ports_are_opened_in_one_place():
    """
    So the check for loopback or TLS cannot be forgotten.
    """
    found = {
        name
        for name, tree in sources()
        for function, _ in called(tree)
        if function.endswith((".add_insecure_port", ".add_secure_port"))
    }

    assert found <= {"kvrelay/rpc/server.py"}


def test_only_the_command_line_prints():
    """
    Services speak by logs.
    """
    found = {
        name for name, tree in sources() for function, _ in called(tree) if function == "print"
    }

    assert not {name for name in found if not name.startswith("kvrelay/cli/")}


def test_every_module_says_its_idea():
    """
    Each opens with a docstring; only empty packages have none.
    """
    assert not [name for name, tree in sources() if tree.body and not ast.get_docstring(tree)]


def test_the_command_starts_without_torch():
    """
    `kvrelay --help` loads neither torch nor gRPC, so it answers at once.
    """
    script = (
        "import sys, kvrelay.cli.app; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    )

    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
