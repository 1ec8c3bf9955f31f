"""Compile the Triton kernels for GPUs that are not there, and report what the compiler made of them.

Run as a script it compiles launches of the tile tables and prints one JSON record per line:

    python tests/kernel_gate.py sm_90                                              # minutes: all of SD's widths
    python tests/kernel_gate.py sm_90 --widths 40 --dtypes fp16 --forms plain maps --keys ragged

It must run without TRITON_INTERPRET, which decides at import whether kernels can be compiled at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from masa.kernels import device, tiles
from masa.kernels.cross_attention_maps import MAX_MAPS
from masa.kernels.launch import dot_precision, split_width, triton_release
from masa.kernels.tiles import Tile

# Dynamic shared memory per block, bytes (AMD: LDS per workgroup).
SHARED_LIMIT = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TOKENS = {40: 4096, 64: 4096, 80: 1024, 160: 256}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Spilled bytes, stores and loads, that float32 forms may have at SD's widths: what they had when this was recorded.
FP32_SPILLS = {"sm_80": 3660, "sm_89": 3232, "sm_90": 1808}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One compiled configuration: a kernel form at a head width, dtype and tile on an architecture."""

    arch: str
    form: str
    width: int
    dtype: str
    tile: Tile
    even: bool = False  # the keys fill whole blocks; ragged lengths need more registers
    lse: bool = False  # log-sum-exps are stored too, for answers over parts of the keys to merge

    @property
    def name(self) -> str:
        ends = ("-even" if self.even else "") + ("-lse" if self.lse else "")
        return f"{self.arch}-{self.form}-{self.width}-{self.dtype}{ends}"


@dataclass(frozen=True)
class Report:
    """What came out: registers per thread, spilled bytes, shared memory, instructions, compile seconds.

    waiting_loads: global loads in the main loop whose result is used with no matrix work in between; per_score:
    instructions of that loop per score and thread.
    """

    name: str
    tile: Tile
    registers: int
    spills: int
    shared: int
    shared_limit: int
    warpgroup_mma: bool
    wide_copies: bool
    waiting_loads: int
    warnings: str
    per_score: float
    seconds: float

    def problems(self, dtype: str) -> list[str]:
        """Why this configuration must not ship on a CUDA architecture; empty if it may.

        float32 products take three passes over split operands, so those kernels may spill, but no more than they
        did; "auto" avoids them.
        """
        found = []
        if self.spills > (0 if dtype != "fp32" else FP32_SPILLS.get(self.name.split("-")[0], math.inf)):
            found.append(f"{self.spills} bytes spilled")
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {self.shared_limit}")
        if "sm_90" in self.name and dtype != "fp32" and not self.warpgroup_mma:
            found.append("no warpgroup matrix instructions (HGMMA)")
        # A third stage fetches key positions in time; for the masked union of the widest heads it would spill.
        if "sm_90-masked-" in self.name and dtype != "fp32" and self.waiting_loads:
            found.append(f"{self.waiting_loads} loads in the main loop are waited for")
        if dtype != "fp32" and not self.wide_copies:
            found.append("no 16-byte asynchronous copies")
        if self.warnings:
            found.append(self.warnings)
        return found


def launches(arch: str, widths: list[int], dtypes: list[str], forms: list[str], keys: list[str]) -> Iterator[Launch]:
    """The configurations that the tile tables give for these shapes.

    keys: "ragged", any number of keys, and "even", whole blocks of them, where SD's token counts make those.
    """
    for dtype in dtypes:
        for width in widths:
            for form in forms:
                tile = tiles.lookup(arch, form, 4 if dtype == "fp32" else 2, width)
                if "ragged" in keys:
                    yield Launch(arch, form, width, dtype, tile)
                if "even" in keys and form != "maps" and TOKENS.get(width, 1) % tile.block_n == 0:
                    yield Launch(arch, form, width, dtype, tile, even=True)


def build(launch: Launch) -> Report:
    """Compile one configuration and take the result apart."""
    arch, width, tile = launch.arch, launch.width, launch.tile
    split = split_width(width)
    precision = dot_precision(DTYPES[launch.dtype], arch)
    constants: dict[str, object] = {"D": width, "D0": split[0], "D1": split[1], "M": tile.block_m, "N": tile.block_n}
    constants |= {"UNIT": 8, "WIDEN": False, "PRECISION": precision}
    kernel = device.cross_attention_maps_kernel
    if launch.form != "maps":
        kernel = device.mutual_attention_kernel
        constants |= {"MASKED": "masked" in launch.form, "UNION": "union" in launch.form}
        constants |= {"KV_INDEX": None, "KV_INDEX2": None}  # rows by value
        if not launch.lse:
            constants["LSE"] = None
        if "masked" not in launch.form:
            constants |= dict.fromkeys(("KEY_ORDER", "KEY_COUNT", "QUERY_ORDER", "QUERY_WEIGHT", "FULL_ROWS"))
        constants["EVEN"] = launch.even
        constants["ONES"] = tile.ones_column and width < sum(split)
    else:
        constants["T"] = MAX_MAPS

    # As in a UNet: 8 heads, (B, N, H, D) in memory; strides in units of 8 elements.
    tokens = TOKENS.get(width, 1024)
    values = {"heads": 8, "n_queries": tokens, "n_keys": tokens, "n_keys2": tokens, "n_maps": 2}
    values |= {"weights_batch": 0}
    if launch.form == "maps":
        values["n_keys"] = 77
    signature: dict[str, str] = {}
    aligned: list[int] = []
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _type(name, launch.dtype)
        stride = {"batch": tokens * width, "token": width, "head": width // 8}.get(name.split("_")[-1], 1)
        value = values.get(name, stride)
        if signature[name].startswith("*") or (signature[name] == "i32" and value % 16 == 0):
            aligned.append(place)

    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch[3:]), 32)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    began = time.perf_counter()
    compiled = compile(_source(kernel, signature, constants, aligned), target=target, options=options)
    seconds = time.perf_counter() - began
    parts = _amd(compiled.asm["amdgcn"]) if hip else _nvidia(compiled, int(arch[3:]), tile)
    shared = compiled.metadata.shared
    return Report(launch.name, tile, shared=shared, shared_limit=SHARED_LIMIT[arch], seconds=seconds, **parts)


def _source(kernel: Any, signature: dict[str, str], constants: dict[str, object], aligned: list[int]) -> ASTSource:
    """What is compiled. aligned: places of the arguments that are multiples of 16."""
    if triton_release() >= (3, 3):
        attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
        return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    from triton.backends.compiler import AttrsDescriptor

    variables = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    hints = AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
    return ASTSource(fn=kernel, signature=variables, constants=constants, attrs=hints)


def _type(name: str, dtype: str) -> str:
    if name in ("Q", "K", "V", "K2", "V2", "OUT"):
        return f"*{dtype}"
    if name in ("QUERY_WEIGHT", "TOKEN_WEIGHTS", "MAPS", "LSE"):
        return "*fp32"
    if name == "FULL_ROWS":
        return "*i1"
    if name.startswith("PACKED"):
        return "i64"
    if name.isupper():
        return "*i32"
    return "fp32" if name in ("scale", "bias") else "i32"


def _nvidia(compiled: object, capability: int, tile: Tile) -> dict[str, object]:
    """Registers and spills from ptxas, instructions from the disassembly."""
    assembly = compiled.asm  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(assembly["ptx"])
        cubin.write_bytes(assembly["cubin"])
        target = re.search(r"^\.target (\w+)", assembly["ptx"], re.M)
        assert target is not None
        # The PTX names the version that its own ptxas understands; Triton ships two.
        for assembler in ("ptxas", "ptxas-blackwell"):
            done = subprocess.run(
                [BINARIES / assembler, "-v", f"--gpu-name={target[1]}", ptx, "-o", Path(folder, "out")],
                capture_output=True,
                text=True,
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        sass = subprocess.run([BINARIES / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    log = done.stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    serialized = [line for line in log.splitlines() if "wgmma" in line or re.search(r"C75\d\d", line)]
    loop = _inner_loop(sass)
    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "warpgroup_mma": "HGMMA" in sass,
        "wide_copies": bool(re.search(r"LDGSTS\.E\.BYPASS[.\w]*\.128|UTMALDG", sass)),
        "warnings": "; ".join(serialized),
        "waiting_loads": _waiting_loads(loop),
        "per_score": round(len(loop) * tile.warps * 32 / (tile.block_m * tile.block_n), 2),
    }


def _amd(assembly: str) -> dict[str, object]:
    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": 4 * number(r"\.vgpr_spill_count:\s+(\d+)"),
        "warpgroup_mma": "v_mfma" in assembly,
        "wide_copies": "global_load_dwordx4" in assembly or "buffer_load_dwordx4" in assembly,
        "waiting_loads": 0,
        "warnings": "",
        "per_score": 0.0,
    }


def _waiting_loads(loop: list[tuple[str, str]]) -> int:
    """Loads into registers that the loop, going round, needs before it issues another matrix instruction."""
    count = 0
    for place, (name, operands) in enumerate(loop):
        target = re.match(r"\s*(R\d+)\b", operands)
        if not name.startswith("LDG.") or target is None:
            continue
        for later, others in loop[place + 1 :] + loop[:place]:
            if later.startswith(("HGMMA", "HMMA", "UTCHMMA")):
                break
            if re.search(rf"\b{target[1]}\b", others):
                count += 1
                break
    return count


def _inner_loop(sass: str) -> list[tuple[str, str]]:
    """Instructions, with operands, of the innermost loop that holds most matrix ones; empty where there is none."""
    labels, body = {}, []
    for line in sass.splitlines():
        label = re.match(r"^(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(body)
        instruction = re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line)
        if instruction:
            body.append((instruction[1], instruction[2]))
    loops = []
    for end, (operation, rest) in enumerate(body):
        jump = re.search(r"`\((\.L_x_\d+)\)", rest) if operation.startswith("BRA") else None
        if jump and labels.get(jump[1], end + 1) <= end:
            start = labels[jump[1]]
            matrix = sum(name.startswith(("HGMMA", "HMMA", "UTCHMMA", "FFMA")) for name, _ in body[start:end])
            loops.append((start, end, matrix))
    # Barrier retries also jump backwards: only loops with matrix instructions count.
    loops = [loop for loop in loops if loop[2]]
    inner = [
        loop
        for loop in loops
        if not any(loop[0] <= other[0] and other[1] <= loop[1] and other != loop for other in loops)
    ]
    start, end, _ = max(inner, key=lambda loop: (loop[2], loop[1] - loop[0]), default=(0, -1, 0))
    return body[start : end + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("arch", nargs="+", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--widths", nargs="+", type=int, default=sorted(TOKENS))
    parser.add_argument("--dtypes", nargs="+", default=["fp16"], choices=list(DTYPES))
    parser.add_argument("--forms", nargs="+", default=list(tiles.FORMS), choices=list(tiles.FORMS))
    parser.add_argument("--keys", nargs="+", default=["ragged", "even"], choices=["ragged", "even"])
    parser.add_argument("--lse", action="store_true", help="with log-sum-exps, of plain attention")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # compile for real, and leave no files behind
        for arch in arguments.arch:
            selected = launches(arch, arguments.widths, arguments.dtypes, arguments.forms, arguments.keys)
            for launch in selected:
                report = build(replace(launch, lse=arguments.lse))
                record = asdict(report) | {"problems": report.problems(launch.dtype)}
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
