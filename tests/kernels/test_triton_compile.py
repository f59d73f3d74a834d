"""What the compiler makes of the kernels for sm_90: no GPU is needed, only the compiler and assembler in triton.

Each file `kernels/triton_*.py` with a function `compile_cases() -> dict[str, Launch]` is compiled, case by case, in a
process of its own without the interpreter, exactly as the launches would have it. Spilled registers, shared memory and
the use of warp-group products are read off the binary.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.stem for path in (ROOT / "kernels").glob("triton_*.py") if "def compile_cases" in path.read_text()
)
SHARED_LIMIT = 232448  # bytes of shared memory that a block may have on sm_90
SPILL_LIMIT = 96  # bytes a thread: finishing fewer columns at a time, so that nothing spills, takes a tenth longer


def signature_of(launch: Any) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types, constants and divisibility by 16 of the arguments, as a launch would specialise them."""
    from triton.runtime.jit import mangle_type

    signature, constants, attributes = {}, {}, {}
    for number, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if not isinstance(value, float) and (not isinstance(value, int) or value % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    extra = launch.arguments.keys() - signature.keys()
    assert not extra, f"{launch.kernel.__name__} has no arguments {extra}"
    return signature, constants, attributes


def compile_for_sm90(launch: Any) -> dict[str, Any]:
    """Compile as far as the binary: registers and spilled bytes a thread, shared bytes a block, wgmma or not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = signature_of(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    text = usage.stdout + usage.stderr
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": numbers["REG"],
        "spilled": max(numbers["STACK"], numbers["LOCAL"]),
        "shared": compiled.metadata.shared,
        "wgmma": "HGMMA" in code,
        "expects_wgmma": launch.uses_wgmma,
    }


@functools.cache
def compiled(module: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.run(
        [sys.executable, __file__, module], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_kernels_fit_sm90(module):
    pytest.importorskip("triton")
    found = compiled(module)
    assert found

    failed = {
        name: case
        for name, case in found.items()
        if case["spilled"] > SPILL_LIMIT
        or case["shared"] > SHARED_LIMIT
        or (case["expects_wgmma"] and not case["wgmma"])
    }
    assert not failed, "\n".join(f"{name}: {case}" for name, case in failed.items())


if __name__ == "__main__":  # test_triton_compile.py MODULE [PART_OF_A_NAME ...]
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    cases = importlib.import_module(f"hf_moe_ext.kernels.{sys.argv[1]}").compile_cases()
    wanted = [name for name in cases if all(part in name for part in sys.argv[2:])]
    results = {}
    for name in wanted:
        results[name] = compile_for_sm90(cases[name])
        print(name, results[name], file=sys.stderr, flush=True)
    print(json.dumps(results))
