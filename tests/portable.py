"""Runs the numeric tests as other machines would, and tabulates how close to its bound each comparison comes.

    make test-portable

Rounding differs between machines: with their vector instructions, the number of threads that share a sum, the library
that multiplies matrices, and what the compiler rearranges. A bound that holds here by luck fails elsewhere; one of ten
times what rounding does, a margin of 0.1, holds. Not every machine can be had on one: a variant that asks for more
than the processor has falls back to what it has, and its program's digest is then that of another variant.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

_TESTS = pathlib.Path(__file__).parent
_OUTPUT = _TESTS.parent / ".cache" / "portable"
# What is left out compares nothing that is computed in floating point, or compares runs with themselves, bit for bit.
_NUMERIC = ("objectives", "models", "diffusion", "convert", "evaluation", "test_encoder.py", "test_prepare_text.py")
_NUMERIC += ("test_sample.py", "test_sample_prompts.py", "test_fast_sampling.py", "test_miniature.py")
_NUMERIC += ("test_compare.py", "test_train_vae.py", "test_text_to_video_benchmark.py")
# A margin that no variant changes is not rounding's: a statistic of fixed draws, or by how much a loss has to fall.
_MOVED = 1e-3


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is changed of the tests' usual environment.

    Attributes:
        flags: of XLA; they come after the tests' own, and so they count.
        nproc: threads of XLA; there are as many as devices at least, and the tests make eight.
        others: environment of PyTorch, oneDNN and OpenBLAS.
    """

    flags: str
    nproc: int
    others: tuple[tuple[str, str], ...] = ()


_OLD = (("ATEN_CPU_CAPABILITY", "default"), ("ONEDNN_MAX_CPU_ISA", "SSE41"), ("OPENBLAS_CORETYPE", "NEHALEM"))
# Each value of each factor, once or more: all combinations would take a day.
VARIANTS = {
    "avx2-o0": Variant("--xla_cpu_max_isa=AVX2 --xla_backend_optimization_level=0", 2),
    "sse4-o0": Variant("--xla_cpu_max_isa=SSE4_2 --xla_backend_optimization_level=0", 1, _OLD),
    "avx512-o3": Variant(
        "--xla_cpu_max_isa=AVX512 --xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true", 8
    ),
    # XLA's other kernels for products and sums, and more threads than devices.
    "avx2-o0-other-kernels": Variant(
        "--xla_cpu_max_isa=AVX2 --xla_backend_optimization_level=0 --xla_cpu_experimental_ynn_fusion_type=", 16
    ),
}


def run(name: str, tests: list[str], processes: int) -> None:
    """Runs the tests as a variant; what was recorded, and how it went, is in the variant's folder."""
    variant, folder = VARIANTS[name], _OUTPUT / name
    shutil.rmtree(folder / "margins", ignore_errors=True)
    environment = {
        **os.environ,
        **dict(variant.others),
        "XLA_FLAGS": variant.flags,
        "NPROC": str(variant.nproc),
        "OSV_JAX_TEST_CACHE": str(folder / "compiled"),
        "OSV_JAX_MARGINS": str(folder / "margins"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_TESTS), os.environ.get("PYTHONPATH")))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "margins", "-q", f"--numprocesses={processes}", "--dist=loadfile"]
    # What `make test` leaves for `make test-integration` is compared, too.
    command += ["-m", "integration or not slow"]
    print(f"{name}: XLA_FLAGS='{variant.flags}' NPROC={variant.nproc}", flush=True)
    start = time.monotonic()
    # Where `make test` runs, too: tests name the project's files from there.
    finished = subprocess.run([*command, *(f"tests/{test}" for test in tests)], env=environment, cwd=_TESTS.parent)
    outcome = {"passed": finished.returncode == 0, "seconds": time.monotonic() - start}
    (folder / "outcome.json").write_text(json.dumps(outcome))


def read(name: str) -> tuple[str, dict[tuple[str, int], dict]]:
    """The digest of a variant's program, and the tightest comparison of every line that has some."""
    places = {}
    for path in (_OUTPUT / name / "margins").glob("*.json"):
        recorded = json.loads(path.read_text())
        for place in recorded["places"]:
            line = place["file"], place["line"]
            if line not in places or place["margin"] > places[line]["margin"]:
                places[line] = place
    return recorded["program"], places


def table(names: list[str], rows: int) -> str:
    """In Markdown: how the variants went, and the tightest lines whose margin differs between them."""
    programs, recorded = zip(*map(read, names), strict=True)
    lines = ["| variant | XLA_FLAGS, NPROC | machine code, results | tests |", "|---|---|---|---|"]
    for name, program, places in zip(names, programs, recorded, strict=True):
        variant, outcome = VARIANTS[name], json.loads((_OUTPUT / name / "outcome.json").read_text())
        result = f"{'passed' if outcome['passed'] else 'FAILED'} in {outcome['seconds'] / 60:.0f} min"
        count = sum(place["count"] for place in places.values())
        lines.append(f"| {name} | `{variant.flags}` {variant.nproc} | {program} | {result}, {count:,} comparisons |")
    common = set.intersection(*map(set, recorded))
    margins = {line: [places[line]["margin"] for places in recorded] for line in common}
    moved = [line for line, values in margins.items() if max(values) - min(values) > _MOVED * max(values)]
    lines += ["", f"| comparison | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for line in sorted(moved, key=lambda line: -max(margins[line]))[:rows]:
        text = recorded[0][line]["text"].replace("|", "\\|")
        cells = " | ".join(f"{margin:.3f}" for margin in margins[line])
        lines.append(f"| {line[0]}:{line[1]} `{text[:80]}` | {cells} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=_NUMERIC, help="paths below tests/")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=25, help="of the table")
    parser.add_argument("--table", action="store_true", help="tabulate what the last run recorded, without another")
    arguments = parser.parse_args()
    if not arguments.table:
        for name in arguments.variants:
            run(name, arguments.tests, arguments.processes)
    text = table(arguments.variants, arguments.rows)
    (_OUTPUT / "table.md").write_text(text + "\n")
    print(text)
    outcomes = [json.loads((_OUTPUT / name / "outcome.json").read_text()) for name in arguments.variants]
    return 0 if all(outcome["passed"] for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
